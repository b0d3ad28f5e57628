#pragma once
// NCCL as the communicator uses it: calls that throw, a channel (an NCCL communicator with a stream of its
// own), and the thread that watches them. Nothing else includes NCCL's header.

#include <array>
#include <condition_variable>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "kernels/core/gpu.h"
#include "parallel/communicator.h"

struct ncclComm;

namespace upmoe::nccl {

// These throw Error(kCommunicator) with NCCL's own words.
using Comm = ncclComm*;
using Id = std::array<std::byte, 128>;  // by which ranks find each other
// Before anything else: NCCL begins operations of several communicators in the order in which the host gave them.
// They take turns on a GPU, and each occupies a part of it until its peers have come: in another order on each rank
// all of them can wait for each other. Throws where NCCL is older than 2.26, which knows no such order.
void begin();
Id new_id();
Comm join(const Id& id, int ranks, int rank);             // collective over the ranks
Comm split(Comm parent, bool alone, int color, int key);  // collective over the parent; null for one alone
// Bytes as they are, in the order of the stream. Nothing is done for none.
void send(Comm comm, Stream& stream, const std::byte* data, std::size_t bytes, int to);
void receive(Comm comm, Stream& stream, std::byte* data, std::size_t bytes, int from);
void gather(Comm comm, Stream& stream, std::byte* out, const std::byte* data, std::size_t bytes);
void broadcast(Comm comm, Stream& stream, std::byte* data, std::size_t bytes, int root);

// The sends and receives of its lifetime are one operation; end() starts it.
class Group {
 public:
  Group();
  ~Group();  // behind an error the operation is given up
  Group(const Group&) = delete;
  void end();

 private:
  bool open_ = true;
};

// Watches the channels of one rank from a thread: tells the watchdog which verbs are done, and finds what
// NCCL reports between calls (a dead peer, a broken link). Such an error ends the process with kCommunicator
// and a message, because verbs on other streams would wait for ever; where a handler is set, it is called
// instead, all channels are aborted and every later verb throws.
class Progress {
 public:
  Progress();  // of the calling thread's GPU
  ~Progress();
  Progress(const Progress&) = delete;

  int device() const { return device_; }
  void add(Comm comm, const std::string& ranks);
  // Takes it out before it is destroyed; false: it has been aborted and is gone.
  bool remove(Comm comm);
  // A verb that the watchdog was told of is done when `done` has passed.
  void track(std::uint64_t sequence, std::shared_ptr<gpu::Event> done);
  // Calls of NCCL with channels of this rank, by its thread: none is aborted, and so gone, before they return. Throws
  // what was found before.
  void while_sound(const std::function<void()>& calls);
  // By the rank's thread, outside of such calls. Later ones throw.
  void abort_all() noexcept;

 private:
  struct Operation {
    std::uint64_t sequence;
    std::shared_ptr<gpu::Event> done;
  };
  void watch();
  void retire();
  std::string find_error();
  void abort_locked() noexcept;

  int device_;
  std::mutex calling_;  // held while the rank's thread calls NCCL; never waited for with mutex_
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Comm, std::string> comms_;  // and the ranks of each, in words
  std::list<Operation> under_way_;
  std::string failure_;
  bool stop_ = false;
  std::thread thread_;
};

// What a channel does on its stream.
using Calls = std::function<void(Comm comm, Stream& stream)>;

// An NCCL communicator with a stream of its own. Made and used by the rank's thread; destroyed on all its ranks.
class Channel {
 public:
  // Takes over `comm`; `ranks`: in words, for messages.
  Channel(std::shared_ptr<Progress> progress, Comm comm, std::string ranks);
  ~Channel();
  Channel(const Channel&) = delete;
  // Does `calls` behind what `compute` has been given so far; the Pending's wait() holds `compute`, not the host.
  Pending run(const char* verb, Stream* compute, const Calls& calls);
  // Collective over its ranks: nccl::split, when nothing of the channel's is under way any more.
  Comm split(bool alone, int color, int key);
  Stream& stream() { return *stream_; }
  const std::string& ranks() const { return ranks_; }

 private:
  std::shared_ptr<Progress> progress_;
  Comm comm_;
  std::string ranks_;
  std::unique_ptr<Stream> stream_;
  gpu::Event ready_;
};

}  // namespace upmoe::nccl
