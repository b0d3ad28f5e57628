#include "tests/support/fake_cuda/sm90_machine.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "tests/support/fake_cuda/staggered_stack.h"

namespace sm90_twin {

namespace {

constexpr std::size_t kStack = 128 << 10, kMostShared = 227 << 10;
constexpr unsigned kMostThreads = 1024, kMostCluster = 8;  // of a kernel that asks for no leave

thread_local Cluster the_cluster;

}  // namespace

Cluster& cluster() {
  return the_cluster;
}

std::uint64_t now() {
  static thread_local std::uint64_t events = 0;
  return ++events;
}

void fail(const std::string& words) {
  throw Mistake{words};
}

Block::Block(unsigned rank_, unsigned index_, unsigned threads, std::size_t shared_bytes)
    : rank(rank_),
      index(index_),
      alive(threads),
      groups(threads / kGroup + 1),
      warps(threads / 32 + 1),
      memory_(shared_bytes + 1024, 0xff),
      bytes_(shared_bytes),
      grains_(shared_bytes / kGrain + 1) {
  base = memory_.data() + (1024 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 1024) % 1024;
}

std::size_t Block::place(const void* p, std::size_t n, const char* who) const {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < base || at + n > base + bytes_) fail(std::string(who) + ": outside of this block's shared memory");
  return static_cast<std::size_t>(at - base);
}

void Block::begin_write(std::size_t at, std::size_t n, const char* who) {
  if (alive == 0) fail(std::string(who) + " into a block of the cluster that has left");
  for (std::size_t g = at / kGrain; g < (at + n + kGrain - 1) / kGrain; ++g) {
    if (grains_[g].reading > 0)
      fail(std::string(who) + " writes shared memory that a product still reads (byte " +
           std::to_string(g * kGrain) + " of block " + std::to_string(rank) + " of the cluster)");
    if (grains_[g].arriving > 0)
      fail(std::string(who) + " writes shared memory to which another copy is under way");
    ++grains_[g].arriving;
  }
  std::memset(base + at, 0xff, n);
}
void Block::end_write(std::size_t at, std::size_t n, int unfenced_thread) {
  for (std::size_t g = at / kGrain; g < (at + n + kGrain - 1) / kGrain; ++g) {
    --grains_[g].arriving;
    grains_[g].unfenced_thread = unfenced_thread;
    grains_[g].arrived_at = now();
  }
}
void Block::begin_read(const std::vector<std::size_t>& grains, std::uint64_t fenced_at) {
  for (std::size_t g : grains) {
    if (g >= grains_.size()) fail("a product reads outside of shared memory");
    if (grains_[g].arriving > 0)
      fail("a product reads shared memory to which a copy is under way (byte " + std::to_string(g * kGrain) +
           "): a wait is missing");
    if (grains_[g].unfenced_thread >= 0 && grains_[g].arrived_at > fenced_at)
      fail("a product reads what thread " + std::to_string(grains_[g].unfenced_thread) +
           " wrote without fence.proxy.async");
    ++grains_[g].reading;
  }
}
void Block::end_read(const std::vector<std::size_t>& grains) {
  for (std::size_t g : grains) --grains_[g].reading;
}
void Block::show_to_engines(std::size_t grain, int thread) {
  if (grains_[grain].unfenced_thread == thread) grains_[grain].unfenced_thread = -1;
}

void Cluster::make_blocks(unsigned first_block) {
  const std::size_t lanes = std::size_t{launch_.threads} * launch_.cluster;
  if (lanes_.size() > lanes) lanes_.resize(lanes);
  while (lanes_.size() < lanes) add_lane();
  blocks.clear();
  operations_.clear();
  mistake_.clear();
  meeting_ = {};
  for (unsigned rank = 0; rank < launch_.cluster; ++rank) {
    blocks.push_back(
        std::make_unique<Block>(rank, first_block + rank, launch_.threads, launch_.shared_bytes));
    Block& block = *blocks.back();
    block.late = launch_.when == When::kAnytime ? static_cast<unsigned>((*random_)() % 64)
                 : rank == 0                    ? 0
                                                : 64;
    for (unsigned i = 0; i < launch_.threads; ++i) {
      ThreadState& thread = *lanes_[rank * launch_.threads + i];
      thread = {};
      thread.block = &block;
      thread.index = i;
    }
  }
  left_ = launch_.threads * launch_.cluster;
}

// A fiber is kept for the threads of the clusters to come.
void Cluster::add_lane() {
  namespace context = boost::context;
  const std::size_t number = lanes_.size();
  lanes_.push_back(std::make_unique<Lane>());
  Lane* lane = lanes_.back().get();
  lane->fiber = context::fiber(std::allocator_arg, simt::StaggeredStack(kStack, number),
                               [this, lane](context::fiber&& scheduler) {
                                 lane->scheduler = std::move(scheduler);
                                 for (;;) {
                                   run_body(*lane);
                                   lane->finished = true;
                                   lane->scheduler = std::move(lane->scheduler).resume();
                                 }
                                 return context::fiber();
                               });
}
void Cluster::run_body(const Lane& lane) {
  try {
    (*body_)();
  } catch (const Mistake& mistake) {
    mistake_ = "block " + std::to_string(lane.block->index) + ", thread " + std::to_string(lane.index) +
               ": " + mistake.words;
  }
}

void Cluster::run(const Launch& launch, unsigned first_block, std::mt19937_64& random,
                  const std::function<void()>& body) {
  launch_ = launch;
  random_ = &random;
  body_ = &body;
  make_blocks(first_block);
  try {
    while (left_ > 0) {
      const bool ran = turn();
      if (!progress(ran) && !ran && left_ > 0) fail(stuck());
    }
    check_end();
  } catch (...) {
    lanes_.clear();  // stopped on their way
    throw;
  }
}

bool Cluster::turn() {
  bool ran = false;
  for (auto& block : blocks)
    if (block->late > 0) {
      --block->late;
      ran = true;
    }
  const std::size_t all = lanes_.size();
  const bool shuffled = launch_.when == When::kAnytime;
  const std::size_t step = shuffled ? 7919 % all : 1;
  std::size_t next = shuffled ? (*random_)() % all : 0;
  for (std::size_t k = 0; k < all; ++k) {
    Lane& lane = *lanes_[next];
    next += step;
    if (next >= all) next -= all;
    if (lane.finished || lane.block->late > 0) continue;
    if (lane.waits && !lane.may_go_on()) continue;
    lane.waits = false;
    ran = true;
    run_lane(lane);
  }
  return ran;
}

void Cluster::run_lane(Lane& lane) {
  current_ = &lane;
  threadIdx = {lane.index, 0, 0};
  blockIdx = {lane.block->index, 0, 0};
  lane.fiber = std::move(lane.fiber).resume();
  if (!mistake_.empty()) throw Mistake{mistake_};
  if (lane.finished) {
    --left_;
    --lane.block->alive;
  }
}

bool Cluster::progress(bool ran) {
  bool happened = false, loudly = false;
  std::size_t left = 0;
  for (OperationPtr& operation : operations_) {
    const bool must = !ran && !loudly;
    const bool now =
        launch_.when == When::kEarliest || must || (launch_.when == When::kAnytime && (*random_)() % 8 == 0);
    const bool held =
        std::any_of(operation->after.begin(), operation->after.end(), [](const auto& o) { return !o->done; });
    if (!now || held) {
      if (OperationPtr& place = operations_[left++]; &place != &operation) place = std::move(operation);
      continue;
    }
    operation->happen();
    operation->done = true;
    operation->after.clear();
    happened = true;
    loudly = loudly || !operation->quiet;
  }
  operations_.resize(left);
  return happened;
}

void Cluster::check_end() const {
  for (const OperationPtr& operation : operations_)
    fail(std::string("the block ends while ") + operation->what + " is under way");
  for (const auto& block : blocks)
    for (const auto& [at, barrier] : block->barriers)
      if (barrier.bytes != 0)
        fail("the block ends while the barrier at byte " + std::to_string(at) + " expects " +
             std::to_string(barrier.bytes) + " bytes");
}

std::string Cluster::stuck() const {
  std::map<std::string, int> why;
  for (const auto& lane : lanes_)
    if (!lane->finished) ++why["of block " + std::to_string(lane->block->index) + " " + lane->words()];
  std::string all = "nobody can go on:";
  for (const auto& [words, lanes] : why) all += "\n  " + std::to_string(lanes) + " threads " + words;
  return all;
}

void Cluster::wait() {
  Lane& lane = *current_;
  lane.waits = true;
  lane.scheduler = std::move(lane.scheduler).resume();
}

void Cluster::meet(Meeting& meeting, unsigned all, const char* words) {
  const unsigned generation = meeting.generation;
  if (++meeting.here == all) {
    meeting.here = 0;
    ++meeting.generation;
  }
  wait_for_change(meeting.generation, ~0u, generation, [words] { return std::string(words); });
}
void Cluster::block_barrier() {
  meet(block().meeting, launch_.threads, "wait at __syncthreads");
}
void Cluster::warp_barrier(unsigned mask) {
  if (mask != 0xffffffffu) fail("a shuffle or __syncwarp of a part of a warp: not modelled");
  meet(block().warps[lane().index / 32].meeting, 32, "wait at a shuffle, a matrix or __syncwarp");
}
const std::uint64_t* Cluster::exchange(unsigned mask, std::uint64_t word) {
  Warp& warp = block().warps[lane().index / 32];
  std::uint64_t* words = warp.words[warp.meeting.generation % 2];
  words[lane().index % 32] = word;
  warp_barrier(mask);
  return words;
}
void Cluster::arrive_at_cluster() {
  Lane& lane = *current_;
  if (lane.arrived) fail("barrier.cluster.arrive: this thread has not waited for the last one");
  lane.arrived = true;
  // A release: what was stored in other blocks is there.
  wait_until(
      [&lane] {
        return std::all_of(lane.remote_stores.begin(), lane.remote_stores.end(),
                           [](const OperationPtr& store) { return store->done; });
      },
      [] { return std::string("wait for their stores to other blocks (barrier.cluster.arrive)"); });
  lane.remote_stores.clear();
  lane.cluster_generation = meeting_.generation;
  if (++meeting_.here == launch_.threads * launch_.cluster) {
    meeting_.here = 0;
    ++meeting_.generation;
  }
}
void Cluster::wait_for_cluster() {
  Lane& lane = *current_;
  if (!lane.arrived) fail("barrier.cluster.wait: this thread has not arrived");
  lane.arrived = false;
  wait_for_change(meeting_.generation, ~0u, lane.cluster_generation,
                  [] { return std::string("wait for the cluster"); });
}

void wait_groups(OperationGroups& groups, std::size_t keep, const char* words) {
  if (groups.ends.size() <= keep) return;
  const std::size_t over = groups.ends.size() - keep, until = groups.ends[over - 1];
  cluster().wait_until(
      [&groups, until, at = std::size_t{0}]() mutable {
        while (at < until && groups.operations[at]->done) ++at;
        return at == until;
      },
      [words] { return std::string(words); });
  groups.operations.erase(groups.operations.begin(),
                          groups.operations.begin() + static_cast<std::ptrdiff_t>(until));
  groups.ends.erase(groups.ends.begin(), groups.ends.begin() + static_cast<std::ptrdiff_t>(over));
  for (std::size_t& end : groups.ends) end -= until;
}

void run(const Launch& launch, const std::function<void()>& body) {
  if (launch.shared_bytes > kMostShared) fail("too much shared memory");
  if (launch.blocks == 0) fail("a grid of no blocks");
  if (launch.threads == 0 || launch.threads > kMostThreads) fail("a block of none or too many threads");
  if (launch.cluster == 0 || launch.cluster > kMostCluster)
    fail("a cluster of none or of more than 8 blocks, which a launch refuses");
  if (launch.blocks % launch.cluster != 0) fail("the grid is not whole clusters");
  std::mt19937_64 random(launch.seed);
  gridDim = launch.blocks;
  blockDim = launch.threads;
  simt::Runner* before = simt::set_runner(&cluster());
  counted = launch.traffic;
  const auto end = [before] {
    simt::set_runner(before);
    counted = nullptr;
  };
  try {
    for (unsigned first = 0; first < launch.blocks; first += launch.cluster)
      cluster().run(launch, first, random, body);
  } catch (...) {
    end();
    throw;
  }
  end();
  if (launch.traffic != nullptr) launch.traffic->end();
}

}  // namespace sm90_twin
