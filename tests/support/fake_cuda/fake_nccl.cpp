// NCCL between threads of one process. An operation is one piece of work on its stream: it shows the peers
// what it sends, takes what they show, and ends when all that it showed has been taken. As with NCCL itself an
// operation whose peer is gone never ends by itself: the communicator has an error, and its owner aborts it.
// A GPU takes a few operations at once; who has begun keeps its place until its peers have come.

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/fake_cuda/fake_nccl_places.h"
#include "tests/support/fake_cuda/fake_world.h"
#include "tests/support/fake_cuda/nccl.h"

namespace {

// What a test has planted, or nothing.
ncclResult_t planned(const char* call) {
  return static_cast<ncclResult_t>(fake_cuda::planted(call));
}

// A message: kind of operation, its number, from, to.
using Name = std::array<std::uint64_t, 4>;
constexpr std::uint64_t kPair = 0, kCollective = 1;

struct Shown {
  const std::byte* data;
  std::size_t bytes;
};

struct Clique {  // the ranks of one communicator
  explicit Clique(int n) : size(n) {}
  const int size;
  std::mutex mutex;
  std::condition_variable changed;
  std::map<Name, Shown> shown;
  std::set<int> gone;  // aborted
  int arrived = 0;
  // One split at a time.
  std::map<int, std::pair<int, int>> wishes;  // of a rank: colour and key
  std::map<int, std::shared_ptr<Clique>> children;
  int served = 0;
};

struct Message {
  Name name;
  int peer;
  std::byte* to;          // null where it is sent
  const std::byte* from;  // null where it is received
  std::size_t bytes;
};

}  // namespace

struct ncclComm {
  ncclComm(std::shared_ptr<Clique> c, int r) : clique(std::move(c)), rank(r) {}
  std::shared_ptr<Clique> clique;
  int rank;
  std::shared_ptr<std::atomic<int>> error = std::make_shared<std::atomic<int>>(ncclSuccess);
  std::shared_ptr<std::atomic<bool>> aborted = std::make_shared<std::atomic<bool>>(false);
  std::map<int, std::uint64_t> sent, received;
  std::uint64_t collectives = 0;
  cudaStream_t stream = nullptr;
};

namespace {

std::mutex worlds_mutex;
std::map<std::uint64_t, std::shared_ptr<Clique>> worlds;  // by the number in the id
std::set<ncclComm_t> alive;
std::uint64_t next_world = 1;
std::vector<fake_cuda::NcclCall> calls;

fake_cuda::NcclPlaces places;
std::atomic<int> version_of_nccl{22809};

struct Call {
  ncclComm_t comm;
  cudaStream_t stream;
  std::vector<Message> messages;
};
thread_local int group_depth = 0;
thread_local std::vector<Call> grouped;

ncclComm_t born(std::shared_ptr<Clique> clique, int rank) {
  const std::lock_guard lock(worlds_mutex);
  return *alive.insert(new ncclComm(std::move(clique), rank)).first;
}
// False: it had been already, or never lived. NCCL itself may say so, or break.
bool die(ncclComm_t comm) {
  const std::lock_guard lock(worlds_mutex);
  return alive.erase(comm) > 0;
}
bool is_alive(ncclComm_t comm) {
  const std::lock_guard lock(worlds_mutex);
  return alive.contains(comm);
}

void note(const char* name, ncclComm_t comm, int peer, std::size_t bytes) {
  const std::lock_guard lock(worlds_mutex);
  calls.push_back({name, comm->clique->size, comm->rank, peer, bytes});
}

// On the stream's thread.
void exchange(const std::vector<Message>& messages, const std::shared_ptr<Clique>& clique,
              std::atomic<int>& error, const std::atomic<bool>& aborted) {
  std::unique_lock lock(clique->mutex);
  const auto stuck = [&](ncclResult_t code) {
    error = code;
    clique->changed.wait(lock, [&] { return aborted.load(); });
  };
  if (aborted) return;
  for (const Message& m : messages)
    if (m.from != nullptr) clique->shown[m.name] = {m.from, m.bytes};
  clique->changed.notify_all();
  for (const Message& m : messages) {
    if (m.to == nullptr) continue;
    clique->changed.wait(
        lock, [&] { return clique->shown.contains(m.name) || clique->gone.contains(m.peer) || aborted; });
    if (aborted) return;
    const auto it = clique->shown.find(m.name);
    if (it == clique->shown.end()) return stuck(ncclRemoteError);
    if (it->second.bytes != m.bytes) return stuck(ncclInvalidUsage);  // NCCL itself would hang or overwrite
    std::memcpy(m.to, it->second.data, m.bytes);
    clique->shown.erase(it);
    clique->changed.notify_all();
  }
  for (const Message& m : messages) {
    if (m.from == nullptr) continue;
    clique->changed.wait(
        lock, [&] { return !clique->shown.contains(m.name) || clique->gone.contains(m.peer) || aborted; });
    if (aborted) return;
    if (clique->shown.contains(m.name)) return stuck(ncclRemoteError);
  }
}

ncclResult_t start(const Call& call) {
  ncclComm_t c = call.comm;
  if (!is_alive(c)) return ncclInvalidArgument;
  // The communicator's operations have one order because they have one stream.
  if (c->stream != nullptr && c->stream != call.stream) return ncclInvalidUsage;
  c->stream = call.stream;
  fake_cuda::Ranges reads, writes;
  for (const Message& m : call.messages)
    m.to != nullptr ? writes.push_back({m.to, m.bytes}) : reads.push_back({m.from, m.bytes});
  fake_cuda::touched(call.stream, "NCCL", reads, writes);
  int device = 0;
  cudaGetDevice(&device);
  fake_cuda::enqueue(call.stream, [messages = call.messages, clique = c->clique, error = c->error,
                                   aborted = c->aborted, turn = places.next(device)] {
    places.enter(turn, *aborted);
    exchange(messages, clique, *error, *aborted);
    places.leave(turn);
  });
  return ncclSuccess;
}

ncclResult_t give(Call call) {
  if (group_depth == 0) return start(call);
  for (Call& other : grouped)
    if (other.comm == call.comm && other.stream == call.stream) {
      other.messages.insert(other.messages.end(), call.messages.begin(), call.messages.end());
      return ncclSuccess;
    }
  grouped.push_back(std::move(call));
  return ncclSuccess;
}

std::uint64_t number(int rank) {
  return static_cast<std::uint64_t>(rank);
}

}  // namespace

namespace fake_cuda {

void set_nccl_at_once(int operations) {
  places.set_at_once(operations);
}
void set_nccl_version(int version) {
  version_of_nccl = version;
}
std::vector<NcclCall> take_nccl_calls() {
  const std::lock_guard lock(worlds_mutex);
  return std::exchange(calls, {});
}

}  // namespace fake_cuda

ncclResult_t ncclGetVersion(int* version) {
  *version = version_of_nccl;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t result) {
  constexpr const char* kWords[] = {"no error",
                                    "unhandled cuda error",
                                    "unhandled system error",
                                    "internal error",
                                    "invalid argument",
                                    "invalid usage",
                                    "remote process exited or there was a network error",
                                    "NCCL operation in progress"};
  return kWords[result];
}
const char* ncclGetLastError(ncclComm_t) {
  return "";
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const std::lock_guard lock(worlds_mutex);
  std::memset(id->internal, 0, sizeof id->internal);
  std::memcpy(id->internal, &next_world, sizeof next_world);
  ++next_world;
  return planned("ncclGetUniqueId");
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
  if (const ncclResult_t e = planned("ncclCommInitRank"); e != ncclSuccess) return e;
  std::shared_ptr<Clique> clique;
  {
    const std::lock_guard lock(worlds_mutex);
    std::uint64_t world = 0;
    std::memcpy(&world, id.internal, sizeof world);
    auto& entry = worlds[world];
    if (entry == nullptr) entry = std::make_shared<Clique>(ranks);
    clique = entry;
  }
  if (clique->size != ranks) return ncclInvalidArgument;
  cudaDeviceSynchronize();  // it allocates, which waits for what is under way
  std::unique_lock lock(clique->mutex);
  ++clique->arrived;
  clique->changed.notify_all();
  clique->changed.wait(lock, [&] { return clique->arrived == ranks; });
  *comm = born(clique, rank);
  return ncclSuccess;
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* child, ncclConfig_t*) {
  if (!is_alive(comm)) return ncclInvalidArgument;
  if (const ncclResult_t e = planned("ncclCommSplit"); e != ncclSuccess) return e;
  Clique& c = *comm->clique;
  std::unique_lock lock(c.mutex);
  c.changed.wait(lock, [&] { return c.served == 0; });  // the split before this one is over
  c.wishes[comm->rank] = {color, key};
  c.changed.notify_all();
  c.changed.wait(lock, [&] { return static_cast<int>(c.wishes.size()) == c.size; });
  std::vector<std::pair<int, int>> members;  // key and rank
  for (const auto& [rank, wish] : c.wishes)
    if (wish.first == color) members.emplace_back(wish.second, rank);
  std::sort(members.begin(), members.end());
  *child = nullptr;
  if (color != NCCL_SPLIT_NOCOLOR) {
    auto& clique = c.children[color];
    if (clique == nullptr) clique = std::make_shared<Clique>(static_cast<int>(members.size()));
    const auto me = std::find(members.begin(), members.end(), std::pair(key, comm->rank));
    *child = born(clique, static_cast<int>(me - members.begin()));
  }
  if (++c.served == c.size) {
    c.wishes.clear();
    c.children.clear();
    c.served = 0;
    c.changed.notify_all();
  } else {
    c.changed.wait(lock, [&] { return c.served == 0; });
  }
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (!die(comm)) return ncclInvalidArgument;
  if (comm->stream != nullptr) cudaStreamSynchronize(comm->stream);
  delete comm;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  if (!die(comm)) return ncclInvalidArgument;
  {
    Clique& clique = *comm->clique;
    const std::lock_guard lock(clique.mutex);
    clique.gone.insert(comm->rank);
    *comm->aborted = true;
    // Its memory may go now: nobody looks there any more.
    std::erase_if(clique.shown, [&](const auto& shown) { return shown.first[2] == number(comm->rank); });
    clique.changed.notify_all();
  }
  places.look_again();
  delete comm;
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  if (!is_alive(comm)) return ncclInvalidArgument;
  *error = static_cast<ncclResult_t>(comm->error->load());
  if (*error == ncclSuccess) *error = planned("async error");
  return planned("ncclCommGetAsyncError");
}
ncclResult_t ncclGroupStart() {
  ++group_depth;
  return planned("ncclGroupStart");
}
ncclResult_t ncclGroupEnd() {
  if (group_depth == 0) return ncclInvalidUsage;
  if (--group_depth > 0) return ncclSuccess;
  const std::vector<Call> all = std::exchange(grouped, {});
  if (const ncclResult_t e = planned("ncclGroupEnd"); e != ncclSuccess) return e;
  for (const Call& call : all)
    if (const ncclResult_t e = start(call); e != ncclSuccess) return e;
  return ncclSuccess;
}
ncclResult_t ncclSend(const void* data, std::size_t count, ncclDataType_t, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  if (!is_alive(comm) || peer < 0 || peer >= comm->clique->size || data == nullptr)
    return ncclInvalidArgument;
  if (const ncclResult_t e = planned("ncclSend"); e != ncclSuccess) return e;
  note("ncclSend", comm, peer, count);
  return give({comm,
               stream,
               {{{kPair, comm->sent[peer]++, number(comm->rank), number(peer)},
                 peer,
                 nullptr,
                 static_cast<const std::byte*>(data),
                 count}}});
}
ncclResult_t ncclRecv(void* data, std::size_t count, ncclDataType_t, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  if (!is_alive(comm) || peer < 0 || peer >= comm->clique->size || data == nullptr)
    return ncclInvalidArgument;
  if (const ncclResult_t e = planned("ncclRecv"); e != ncclSuccess) return e;
  note("ncclRecv", comm, peer, count);
  return give({comm,
               stream,
               {{{kPair, comm->received[peer]++, number(peer), number(comm->rank)},
                 peer,
                 static_cast<std::byte*>(data),
                 nullptr,
                 count}}});
}
ncclResult_t ncclAllGather(const void* data, void* out, std::size_t count, ncclDataType_t, ncclComm_t comm,
                           cudaStream_t stream) {
  if (!is_alive(comm)) return ncclInvalidArgument;
  if (const ncclResult_t e = planned("ncclAllGather"); e != ncclSuccess) return e;
  note("ncclAllGather", comm, -1, count);
  const std::uint64_t operation = comm->collectives++;
  Call call{comm, stream, {}};
  const auto* from = static_cast<const std::byte*>(data);
  std::byte* own = static_cast<std::byte*>(out) + number(comm->rank) * count;
  fake_cuda::touched(stream, "NCCL", {{from, count}}, {{own, count}});
  fake_cuda::enqueue(stream, [own, from, count] {
    if (own != from) std::memcpy(own, from, count);
  });
  for (int p = 0; p < comm->clique->size; ++p) {
    if (p == comm->rank) continue;
    call.messages.push_back(
        {{kCollective, operation, number(comm->rank), number(p)}, p, nullptr, from, count});
    call.messages.push_back({{kCollective, operation, number(p), number(comm->rank)},
                             p,
                             static_cast<std::byte*>(out) + number(p) * count,
                             nullptr,
                             count});
  }
  return give(std::move(call));
}
ncclResult_t ncclBroadcast(const void* data, void* out, std::size_t count, ncclDataType_t, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  if (!is_alive(comm) || root < 0 || root >= comm->clique->size) return ncclInvalidArgument;
  if (const ncclResult_t e = planned("ncclBroadcast"); e != ncclSuccess) return e;
  note("ncclBroadcast", comm, root, count);
  const std::uint64_t operation = comm->collectives++;
  Call call{comm, stream, {}};
  for (int p = 0; p < comm->clique->size; ++p) {
    if (comm->rank == root && p != root)
      call.messages.push_back({{kCollective, operation, number(root), number(p)},
                               p,
                               nullptr,
                               static_cast<const std::byte*>(data),
                               count});
    if (comm->rank != root && p == comm->rank)
      call.messages.push_back({{kCollective, operation, number(root), number(p)},
                               root,
                               static_cast<std::byte*>(out),
                               nullptr,
                               count});
  }
  return give(std::move(call));
}
