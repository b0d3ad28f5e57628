#include "tests/support/fake_cuda/simt_host.h"

#include <boost/context/fiber.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace simt {

namespace {

namespace context = boost::context;

constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kMostShared = 227 << 10, kStack = 256 << 10;

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "simt_host: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, what);
  std::fflush(stderr);
  std::abort();
}

std::uint64_t seed_of_environment() {
  const char* text = std::getenv("UPMOE_SIMT_ORDER");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 0;
}

std::uint64_t order_seed = seed_of_environment();

struct Lane {
  enum class Waits { kNothing, kWarp, kBlock };
  context::fiber fiber, scheduler;
  uint3 index;
  Waits waits = Waits::kNothing;
  unsigned mask = 0;  // of the lanes it waits for
  bool finished = false;
};

// The block that this operating-system thread runs. Its lanes are made once and used for every block.
class Block : public Runner {
 public:
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    threads_ = threads;
    while (lanes_.size() < threads) add_lane();
    for (unsigned i = 0; i < threads; ++i) {
      lanes_[i]->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      lanes_[i]->waits = Lane::Waits::kNothing;
      lanes_[i]->finished = false;
    }
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0u);
    unfinished_ = threads;
    while (unfinished_ > 0) {
      const bool ran = turn();
      if (!release_warps() && !ran) release_block();
    }
  }
  void wait(Lane::Waits what, unsigned mask) {
    Lane& lane = *current_;
    lane.waits = what;
    lane.mask = mask;
    lane.scheduler = std::move(lane.scheduler).resume();
  }
  std::byte* shared(std::size_t bytes) {
    if (shared_.size() < bytes + 128) shared_.resize(bytes + 128);
    auto address = reinterpret_cast<std::uintptr_t>(shared_.data());
    dynamic_ = shared_.data() + (128 - address % 128) % 128;
    std::memset(dynamic_, 0xff, bytes);  // NaNs: nothing is there before somebody writes it
    return dynamic_;
  }
  void block_barrier() override { wait(Lane::Waits::kBlock, 0); }
  void warp_barrier(unsigned mask) override { wait(Lane::Waits::kWarp, mask); }
  std::byte* dynamic_shared() override { return dynamic_; }
  std::uint64_t* exchange() override { return exchange_[flat(*current_) / 32]; }

 private:
  static unsigned flat(const Lane& lane) {
    return lane.index.x + blockDim.x * (lane.index.y + blockDim.y * lane.index.z);
  }
  void add_lane() {
    lanes_.push_back(std::make_unique<Lane>());
    Lane* lane = lanes_.back().get();
    lane->fiber = context::fiber(std::allocator_arg, context::fixedsize_stack(kStack),
                                 [this, lane](context::fiber&& scheduler) {
                                   lane->scheduler = std::move(scheduler);
                                   for (;;) {
                                     (*body_)();
                                     lane->finished = true;
                                     lane->scheduler = std::move(lane->scheduler).resume();
                                   }
                                   return context::fiber();
                                 });
  }
  void arrange() {
    if (order_seed == 1) {
      for (unsigned i = 0; i < threads_; ++i) order_[i] = threads_ - 1 - i;
    } else if (order_seed > 1) {
      for (unsigned i = threads_; i > 1; --i) {
        random_ = random_ * 6364136223846793005u + order_seed;
        std::swap(order_[i - 1], order_[(random_ >> 33) % i]);
      }
    }
  }
  // Every lane that can go on does, until it waits or ends.
  bool turn() {
    arrange();
    bool ran = false;
    for (unsigned i : order_) {
      Lane& lane = *lanes_[i];
      if (lane.finished || lane.waits != Lane::Waits::kNothing) continue;
      ran = true;
      current_ = &lane;
      threadIdx = lane.index;
      lane.fiber = std::move(lane.fiber).resume();
      if (lane.finished) --unfinished_;
    }
    return ran;
  }
  // Lanes all of whose mask have arrived go on.
  bool release_warps() {
    bool released = false;
    for (unsigned i = 0; i < threads_; ++i) {
      if (lanes_[i]->waits != Lane::Waits::kWarp) continue;
      const unsigned mask = lanes_[i]->mask, warp = i / 32 * 32;
      if ((mask >> (i - warp) & 1) == 0) die("a lane is not in the mask of its own shuffle or __syncwarp");
      bool all = true;
      for (unsigned l = 0; l < 32; ++l) {
        if ((mask >> l & 1) == 0) continue;
        if (warp + l >= threads_ || lanes_[warp + l]->finished)
          die("a shuffle or __syncwarp names a lane that has left or never was");
        all = all && lanes_[warp + l]->waits == Lane::Waits::kWarp && lanes_[warp + l]->mask == mask;
      }
      if (!all) continue;
      released = true;
      for (unsigned l = 0; l < 32; ++l)
        if ((mask >> l & 1) != 0) lanes_[warp + l]->waits = Lane::Waits::kNothing;
    }
    return released;
  }
  void release_block() {
    for (unsigned i = 0; i < threads_; ++i) {
      if (lanes_[i]->finished) die("some lanes wait at __syncthreads, others have left");
      if (lanes_[i]->waits != Lane::Waits::kBlock)
        die("some lanes wait at __syncthreads, others at a shuffle or __syncwarp");
    }
    for (unsigned i = 0; i < threads_; ++i) lanes_[i]->waits = Lane::Waits::kNothing;
  }

  const std::function<void()>* body_ = nullptr;
  unsigned threads_ = 0, unfinished_ = 0;
  Lane* current_ = nullptr;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<unsigned> order_;
  std::uint64_t random_ = 1;
  std::uint64_t exchange_[kMostThreads / 32][32] = {};
  std::vector<std::byte> shared_;
  std::byte* dynamic_ = nullptr;
};

thread_local Block block;
thread_local Runner* runner = &block;

}  // namespace

const char* problem_of(dim3 grid, dim3 threads, std::size_t shared_bytes) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "an empty grid";
  if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return "too large a grid";
  const std::uint64_t n = std::uint64_t{threads.x} * threads.y * threads.z;
  if (n == 0 || n > kMostThreads) return "blocks have 1 to 1024 threads";
  if (shared_bytes > kMostShared) return "too much shared memory";
  return nullptr;
}

void run(dim3 grid, dim3 threads, std::size_t shared_bytes, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = threads;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        block.shared(shared_bytes);
        block.run(threads.x * threads.y * threads.z, body);
      }
}

void set_order(std::uint64_t seed) {
  order_seed = seed;
}
Runner* set_runner(Runner* to) {
  return std::exchange(runner, to);
}
void block_barrier() {
  runner->block_barrier();
}
void warp_barrier(unsigned mask) {
  runner->warp_barrier(mask);
}
std::byte* dynamic_shared() {
  return runner->dynamic_shared();
}
std::uint64_t* exchange() {
  return runner->exchange();
}
unsigned match(unsigned mask, std::uint64_t word) {
  exchange()[lane()] = word;
  warp_barrier(mask);
  unsigned same = 0;
  for (unsigned l = 0; l < 32; ++l)
    if ((mask >> l & 1) != 0 && exchange()[l] == word) same |= 1u << l;
  warp_barrier(mask);
  return same;
}
unsigned ballot(unsigned mask, bool predicate) {
  const unsigned same = match(mask, predicate ? 1 : 0);
  return predicate ? same : mask & ~same;
}

}  // namespace simt
