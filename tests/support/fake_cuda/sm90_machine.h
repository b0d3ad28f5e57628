#pragma once
// The machine behind sm90_emulation.h: the blocks of a cluster at once, their threads as fibers that wait for
// conditions, and operations under way (copies, products), which happen between those threads' turns.
//
// Blocks begin at different moments and barriers open as soon as the last thread has come, so that a missing
// barrier of the cluster shows. For every 16 bytes of shared memory ("grain") the machine knows whether a
// copy to it is under way, whether products still read it, and which thread's write, by an ordinary
// instruction or cp.async, the asynchronous engines have not been shown: by that thread's fence, or by a
// fence of all who ask for a product, behind the write's arrival.

#include <boost/context/fiber.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/fake_cuda/sm90_emulation.h"

namespace sm90_twin {

constexpr std::size_t kGrain = 16;
constexpr std::size_t kLowestAddress = 1024;  // shared addresses do not begin at 0 on a GPU
constexpr int kGroup = 128;                   // threads of a warpgroup
constexpr int kRegistersAtEntry = 168;        // of a thread, as ptxas gives them to 384

[[noreturn]] void fail(const std::string& words);  // throws Mistake

struct Barrier {
  std::uint32_t count = 0, pending = 0;
  std::int64_t bytes = 0;  // expected and not yet there
  unsigned phase = 0;
  unsigned maker = 0;  // the thread that made it
  bool shown = false;  // by that thread, to other blocks and to the copy engine
  void arrive(const char* who);
  void expect(std::int64_t more, const char* who);  // less of them where they have come
  void settle();                                    // ends the phase when nothing is missing
};

struct Operation {  // under way
  explicit Operation(const char* what_) : what(what_) {}
  virtual ~Operation() = default;
  virtual void happen() = 0;
  const char* what;
  std::vector<std::shared_ptr<Operation>> after;  // which it cannot overtake
  bool done = false;
  bool quiet = false;  // seldom what somebody waits for: more may happen in the same moment
};
using OperationPtr = std::shared_ptr<Operation>;
template <class Happen>
OperationPtr make_operation(const char* what, Happen happen) {
  struct Made final : Operation {
    Made(const char* of, Happen h) : Operation(of), happens(std::move(h)) {}
    void happen() override { happens(); }
    Happen happens;
  };
  return std::make_shared<Made>(what, std::move(happen));
}

// A thread's operations of one kind: those of its groups, one behind the other, and those not yet in one.
struct OperationGroups {
  std::vector<OperationPtr> operations;
  std::vector<std::size_t> ends;  // of the groups
  void commit() { ends.push_back(operations.size()); }
  bool are_none() const { return operations.empty() && ends.empty(); }
};

struct Product {  // of a warpgroup; its threads join one by one
  std::uint64_t a, b;
  int n;
  bool add;
  upmoe::cuda::sm90::Major major_a, major_b;
  int joined = 0;
  float* d[kGroup] = {};
  OperationPtr operation;
  std::vector<std::size_t> grains;  // that it reads
  std::uint64_t fenced_at = ~0ull;  // by all of its threads, since then
};
struct Warpgroup {
  std::vector<std::shared_ptr<Product>> products;
  OperationPtr last;
};

struct Meeting {  // a barrier of threads
  unsigned here = 0, generation = 0;
};
struct Warp {
  Meeting meeting;
  std::uint64_t words[2][32] = {};  // exchanged, in turn: who was let go may still read the last ones
  unsigned char* rows[32] = {};     // of stmatrix and ldmatrix
};

class Block {
 public:
  Block(unsigned rank, unsigned index, unsigned threads, std::size_t shared_bytes);
  // The place of `n` bytes in shared memory; fails for what lies elsewhere.
  std::size_t place(const void* p, std::size_t n, const char* who) const;
  Barrier& barrier(std::size_t at, const char* who);
  Barrier& shown_barrier(std::size_t at, const char* who);  // as who is not of this block asks for it

  void begin_write(std::size_t at, std::size_t n, const char* who);    // fills with NaNs
  void end_write(std::size_t at, std::size_t n, int unfenced_thread);  // -1: by an engine
  void begin_read(const std::vector<std::size_t>& grains, std::uint64_t fenced_at);
  void end_read(const std::vector<std::size_t>& grains);
  void show_to_engines(std::size_t grain, int thread);

  unsigned rank, index, alive;
  unsigned late = 0;  // turns until it begins
  unsigned char* base = nullptr;
  int free_registers = 0;  // all that it was launched with are its threads', and others it cannot have
  Meeting meeting;
  std::map<std::size_t, Barrier> barriers;
  std::vector<Warpgroup> groups;
  std::vector<Warp> warps;

 private:
  struct Grain {
    int arriving = 0, reading = 0, unfenced_thread = -1;
    std::uint64_t arrived_at = 0;
  };
  std::vector<unsigned char> memory_;
  std::size_t bytes_;
  std::vector<Grain> grains_;
};

// The sums of products under way; the registers hold NaNs meanwhile.
struct Accumulator {
  float* registers = nullptr;  // null: of none
  std::vector<float> sums;
};
struct ThreadState {
  Block* block = nullptr;
  unsigned index = 0;
  bool waits = false, finished = false;
  // What it waits for: that the bits of *word under `mask` are no longer `old`, or else for the condition.
  const unsigned* word = nullptr;
  unsigned mask = 0, old = 0;
  std::function<bool()> condition;
  std::function<std::string()> words;
  bool may_go_on() const { return word != nullptr ? (*word & mask) != old : condition(); }

  OperationGroups copies, products;
  std::vector<OperationPtr> remote_stores;  // since the last arrival at a barrier of the cluster
  bool arrived = false;                     // at one, and has not waited there
  unsigned cluster_generation = 0;          // of that one
  std::vector<std::size_t> written;         // grains whose copies have arrived
  std::vector<OperationPtr> recent_copies;  // behind which an arrival comes
  std::uint64_t fenced_at = 0;
  std::size_t joined_products = 0;
  bool fenced = false;  // for products, since the last wait
  std::vector<Accumulator> accumulators;
  int registers = kRegistersAtEntry;
};
struct Lane : ThreadState {
  boost::context::fiber fiber, scheduler;
};

class Cluster : public simt::Runner {
 public:
  Lane& lane() { return *current_; }
  Block& block() { return *current_->block; }
  std::vector<std::unique_ptr<Block>> blocks;

  void run(const Launch& launch, unsigned first_block, std::mt19937_64& random,
           const std::function<void()>& body);
  // `words` say what for, to who asks why nobody can go on.
  template <class Condition, class Words>
  void wait_until(Condition condition, const Words& words) {
    if (condition()) return;
    current_->word = nullptr;
    current_->condition = condition;
    current_->words = words;
    wait();
  }
  template <class Words>
  void wait_for_change(const unsigned& word, unsigned mask, unsigned old, const Words& words) {
    if ((word & mask) != old) return;
    current_->word = &word;
    current_->mask = mask;
    current_->old = old;
    current_->words = words;
    wait();
  }
  void meet(Meeting& meeting, unsigned all, const char* words);
  void arrive_at_cluster();
  void wait_for_cluster();
  void begin(const OperationPtr& operation) { operations_.push_back(operation); }

  void block_barrier() override;
  void warp_barrier(unsigned mask) override;
  std::byte* dynamic_shared() override { return reinterpret_cast<std::byte*>(block().base); }
  const std::uint64_t* exchange(unsigned mask, std::uint64_t word) override;

 private:
  void make_blocks(unsigned first_block);
  void add_lane();
  void wait();
  bool turn();  // of every thread that can go on
  void run_body(const Lane& lane);
  void run_lane(Lane& lane);
  bool progress(bool ran);  // of operations
  void check_end() const;
  std::string stuck() const;

  Launch launch_;
  const std::function<void()>* body_ = nullptr;
  std::mt19937_64* random_ = nullptr;
  std::vector<std::unique_ptr<Lane>> lanes_;
  Lane* current_ = nullptr;
  unsigned left_ = 0;
  Meeting meeting_;
  std::vector<OperationPtr> operations_;
  std::string mistake_;
};

Cluster& cluster();  // that this operating-system thread runs

std::uint64_t now();  // a number for every event, rising
// Until all but the last `keep` groups have happened.
void wait_groups(OperationGroups& groups, std::size_t keep, const char* words);

}  // namespace sm90_twin
