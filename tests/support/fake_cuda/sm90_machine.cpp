#include "tests/support/fake_cuda/sm90_machine.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace sm90_twin {

namespace {

constexpr std::size_t kStack = 128 << 10, kMostShared = 227 << 10;
constexpr int kRegistersOfSm = 65536;

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

void Barrier::arrive(const char* who) {
  if (pending == 0) fail(std::string(who) + ": more arrivals in a phase than the barrier counts");
  --pending;
  settle();
}
void Barrier::settle() {
  if (pending != 0 || bytes != 0) return;
  ++phase;
  pending = count;
}

Block::Block(unsigned rank_, unsigned index_, unsigned threads, std::size_t shared_bytes)
    : rank(rank_),
      index(index_),
      alive(threads),
      free_registers(kRegistersOfSm - static_cast<int>(threads) * kRegistersAtEntry),
      groups(threads / kGroup + 1),
      warps(threads / 32 + 1),
      memory_(shared_bytes + 1024, 0xff),
      bytes_(shared_bytes),
      grains_(shared_bytes / kGrain + 1) {
  base = memory_.data() + (1024 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 1024) % 1024;
}

std::size_t Block::place(const void* p, std::size_t n, const std::string& who) const {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < base || at + n > base + bytes_) fail(who + ": outside of this block's shared memory");
  return static_cast<std::size_t>(at - base);
}
Barrier& Block::barrier(std::size_t at, const std::string& who) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail(who + ": no barrier was made here");
  return found->second;
}

void Block::begin_write(std::size_t at, std::size_t n, const std::string& who) {
  if (alive == 0) fail(who + " into a block of the cluster that has left");
  for (std::size_t g = at / kGrain; g < (at + n + kGrain - 1) / kGrain; ++g) {
    if (grains_[g].reading > 0)
      fail(who + " writes shared memory that a product still reads (byte " + std::to_string(g * kGrain) +
           " of block " + std::to_string(rank) + " of the cluster)");
    if (grains_[g].arriving > 0) fail(who + " writes shared memory to which another copy is under way");
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
  lanes_.clear();
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
    for (unsigned i = 0; i < launch_.threads; ++i) add_lane(block, i);
  }
  left_ = launch_.threads * launch_.cluster;
}

void Cluster::add_lane(Block& block, unsigned index) {
  namespace context = boost::context;
  lanes_.push_back(std::make_unique<Lane>());
  Lane* lane = lanes_.back().get();
  lane->block = &block;
  lane->index = index;
  lane->fiber = context::fiber(std::allocator_arg, context::fixedsize_stack(kStack),
                               [this, lane](context::fiber&& scheduler) {
                                 lane->scheduler = std::move(scheduler);
                                 try {
                                   (*body_)();
                                 } catch (const Mistake& mistake) {
                                   mistake_ = "block " + std::to_string(lane->block->index) + ", thread " +
                                              std::to_string(lane->index) + ": " + mistake.words;
                                 }
                                 lane->finished = true;
                                 return std::move(lane->scheduler);
                               });
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
    lanes_.clear();
    throw;
  }
  lanes_.clear();
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
  const std::size_t shift = shuffled ? (*random_)() % all : 0, step = shuffled ? 7919 : 1;
  for (std::size_t k = 0; k < all; ++k) {
    Lane& lane = *lanes_[(k * step + shift) % all];
    if (lane.finished || lane.block->late > 0) continue;
    if (lane.waits && !lane.condition()) continue;
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
  for (auto it = operations_.begin(); it != operations_.end();) {
    const bool must = !ran && !loudly;
    const bool now =
        launch_.when == When::kEarliest || must || (launch_.when == When::kAnytime && (*random_)() % 8 == 0);
    const bool held =
        std::any_of((*it)->after.begin(), (*it)->after.end(), [](const auto& o) { return !o->done; });
    if (!now || held) {
      ++it;
      continue;
    }
    const OperationPtr operation = *it;
    it = operations_.erase(it);
    operation->happen();
    operation->done = true;
    happened = true;
    loudly = loudly || !operation->quiet;
  }
  return happened;
}

void Cluster::check_end() const {
  for (const OperationPtr& operation : operations_)
    fail("the block ends while " + operation->what + " is under way");
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

void Cluster::wait_until(std::function<bool()> condition, std::function<std::string()> words) {
  if (condition()) return;
  Lane& lane = *current_;
  lane.waits = true;
  lane.condition = std::move(condition);
  lane.words = std::move(words);
  lane.scheduler = std::move(lane.scheduler).resume();
}

void Cluster::meet(Meeting& meeting, unsigned all, const std::string& words) {
  const unsigned generation = meeting.generation;
  if (++meeting.here == all) {
    meeting.here = 0;
    ++meeting.generation;
  }
  wait_until([&meeting, generation] { return meeting.generation != generation; }, [words] { return words; });
}
void Cluster::block_barrier() {
  meet(block().meeting, launch_.threads, "wait at __syncthreads");
}
void Cluster::warp_barrier(unsigned mask) {
  if (mask != 0xffffffffu) fail("a shuffle or __syncwarp of a part of a warp: not modelled");
  meet(block().warps[lane().index / 32].meeting, 32, "wait at a shuffle, a matrix or __syncwarp");
}
void Cluster::meet_cluster() {
  meet(meeting_, launch_.threads * launch_.cluster, "wait for the cluster");
}

OperationPtr make_operation(const std::string& what, std::function<void()> happen) {
  auto operation = std::make_shared<Operation>();
  operation->what = what;
  operation->happen = std::move(happen);
  return operation;
}

void wait_groups(OperationGroups& groups, std::size_t keep, const std::string& words) {
  const std::size_t count = groups.size();
  cluster().wait_until(
      [&groups, keep, count] {
        for (std::size_t i = 0; i + keep < count; ++i)
          for (const OperationPtr& operation : groups[i])
            if (!operation->done) return false;
        return true;
      },
      [words] { return words; });
  while (groups.size() > keep) groups.pop_front();
}

void run(const Launch& launch, const std::function<void()>& body) {
  if (launch.shared_bytes > kMostShared) fail("too much shared memory");
  if (launch.blocks % launch.cluster != 0) fail("the grid is not whole clusters");
  std::mt19937_64 random(launch.seed);
  gridDim = launch.blocks;
  blockDim = launch.threads;
  simt::Runner* before = simt::set_runner(&cluster());
  try {
    for (unsigned first = 0; first < launch.blocks; first += launch.cluster)
      cluster().run(launch, first, random, body);
  } catch (...) {
    simt::set_runner(before);
    throw;
  }
  simt::set_runner(before);
}

}  // namespace sm90_twin
