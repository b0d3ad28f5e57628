#include "tests/support/fake_cuda/simt_host.h"

#include <algorithm>
#include <bit>
#include <boost/context/fiber.hpp>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "tests/support/fake_cuda/staggered_stack.h"

namespace simt {

namespace {

namespace context = boost::context;

constexpr unsigned kMostThreads = 1024, kWarp = 32;
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

// The block that this operating-system thread runs, round by round: in each, every thread that can go on does, until it
// waits or ends. A fiber whose thread has ended goes on with the next one that has not begun, so that a block in which
// nobody waits takes one fiber; one whose thread waits hands over to the next thread's. They are kept for every block.
class Block : public Runner {
 public:
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    begin(threads);
    next();
    go_to(idle_fiber());
  }
  std::byte* shared(std::size_t bytes) {
    if (shared_.size() < bytes + 128) shared_.resize(bytes + 128);
    auto address = reinterpret_cast<std::uintptr_t>(shared_.data());
    dynamic_ = shared_.data() + (128 - address % 128) % 128;
    std::memset(dynamic_, 0xff, bytes);  // NaNs: nothing is there before somebody writes it
    return dynamic_;
  }
  void block_barrier() override {
    ++at_barrier_;
    wait();
  }
  void warp_barrier(unsigned mask) override {
    masks_[current_] = mask;
    warps_[current_ / kWarp].waiting |= 1u << current_ % kWarp;
    wait();
  }
  std::byte* dynamic_shared() override { return dynamic_; }
  const std::uint64_t* exchange(unsigned mask, std::uint64_t word) override {
    Warp& warp = warps_[current_ / kWarp];
    warp.given[current_ % kWarp] = word;
    warp_barrier(mask);
    return warp.seen;
  }

 private:
  struct Warp {
    unsigned there = 0, waiting = 0;  // lanes that have not ended; of those, at a shuffle or __syncwarp
    // What is seen stays until the lanes' next barrier: who was let go reads it in the same round.
    std::uint64_t given[kWarp] = {}, seen[kWarp] = {};
  };
  static constexpr unsigned kOutside = 0, kNone = ~0u;  // the fiber that called run(); no fiber

  void begin(unsigned threads) {
    threads_ = unfinished_ = threads;
    at_barrier_ = 0;
    for (unsigned first = 0; first < threads; first += kWarp) {
      const unsigned n = std::min(kWarp, threads - first);
      warps_[first / kWarp].there = n == kWarp ? ~0u : (1u << n) - 1;
      warps_[first / kWarp].waiting = 0;
    }
    std::fill_n(fiber_of_, threads, kNone);
    ready_.resize(threads);
    std::iota(ready_.begin(), ready_.end(), 0u);
    arrange();
  }
  // In which order this round's threads take their turns.
  void arrange() {
    taken_ = 0;
    if (order_seed == 1) {
      std::reverse(ready_.begin(), ready_.end());
    } else if (order_seed > 1) {
      for (std::size_t i = ready_.size(); i > 1; --i) {
        random_ = random_ * 6364136223846793005u + order_seed;
        std::swap(ready_[i - 1], ready_[(random_ >> 33) * i >> 31]);
      }
    }
  }
  // Takes the thread whose turn it is; false when all have ended.
  bool next() {
    if (taken_ == ready_.size()) {
      if (unfinished_ == 0) return false;
      ready_.clear();
      release_warps();
      if (ready_.empty()) release_block();
      arrange();
    }
    current_ = ready_[taken_++];
    const unsigned x = blockDim.x, row = x == threads_ ? 0 : current_ / x;
    threadIdx = {current_ - row * x, row % blockDim.y, row / blockDim.y};
    return true;
  }
  void wait() {
    const unsigned me = current_;
    next();
    if (current_ != me) go_to(fiber_of_[current_] == kNone ? idle_fiber() : fiber_of_[current_]);
  }
  // Lanes all of whose mask have arrived go on.
  void release_warps() {
    for (unsigned w = 0; w * kWarp < threads_; ++w) {
      Warp& warp = warps_[w];
      unsigned released = 0;
      for (unsigned left = warp.waiting; left != 0; left &= left - 1) {
        const auto lane = static_cast<unsigned>(std::countr_zero(left));
        const unsigned mask = masks_[w * kWarp + lane];
        if ((released >> lane & 1) != 0) continue;
        if ((mask >> lane & 1) == 0) die("a lane is not in the mask of its own shuffle or __syncwarp");
        if ((mask & ~warp.there) != 0) die("a shuffle or __syncwarp names a lane that has left or never was");
        bool all = (mask & ~warp.waiting) == 0;
        for (unsigned l = mask; l != 0 && all; l &= l - 1)
          all = masks_[w * kWarp + static_cast<unsigned>(std::countr_zero(l))] == mask;
        if (all) released |= mask;
      }
      warp.waiting &= ~released;
      for (; released != 0; released &= released - 1) {
        const auto lane = static_cast<unsigned>(std::countr_zero(released));
        warp.seen[lane] = warp.given[lane];
        ready_.push_back(w * kWarp + lane);
      }
    }
  }
  void release_block() {
    if (unfinished_ != threads_) die("some lanes wait at __syncthreads, others have left");
    if (at_barrier_ != threads_) die("some lanes wait at __syncthreads, others at a shuffle or __syncwarp");
    at_barrier_ = 0;
    ready_.resize(threads_);
    std::iota(ready_.begin(), ready_.end(), 0u);
  }

  void go_to(unsigned fiber) {
    came_from_ = std::exchange(running_, fiber);
    context::fiber back = std::move(fibers_[fiber]).resume();
    fibers_[came_from_] = std::move(back);
  }
  unsigned idle_fiber() {
    if (!idle_.empty()) {
      const unsigned fiber = idle_.back();
      idle_.pop_back();
      return fiber;
    }
    const auto number = static_cast<unsigned>(fibers_.size());
    fibers_.emplace_back(std::allocator_arg, StaggeredStack(kStack, number), [this](context::fiber&& back) {
      fibers_[came_from_] = std::move(back);
      for (;;) run_threads();
      return context::fiber();
    });
    return number;
  }
  // Of the block, from the current one on, as long as the next one has not begun; then another fiber's turn comes.
  void run_threads() {
    for (;;) {
      fiber_of_[current_] = running_;
      (*body_)();
      --unfinished_;
      warps_[current_ / kWarp].there &= ~(1u << current_ % kWarp);
      const bool more = next();
      if (more && fiber_of_[current_] == kNone) continue;
      idle_.push_back(running_);
      return go_to(more ? fiber_of_[current_] : kOutside);
    }
  }

  const std::function<void()>* body_ = nullptr;
  unsigned threads_ = 0, unfinished_ = 0, at_barrier_ = 0, current_ = 0;
  std::vector<unsigned> ready_;  // in the order of their turns, of which so many were taken
  std::size_t taken_ = 0;
  std::uint64_t random_ = 1;
  unsigned masks_[kMostThreads] = {}, fiber_of_[kMostThreads] = {};
  Warp warps_[kMostThreads / kWarp];
  std::vector<std::byte> shared_;
  std::byte* dynamic_ = nullptr;

  std::vector<context::fiber> fibers_ = std::vector<context::fiber>(1);  // where each goes on
  std::vector<unsigned> idle_;
  unsigned running_ = kOutside, came_from_ = kOutside;
};

Block& block() {
  thread_local Block of_thread;
  return of_thread;
}
thread_local constinit Runner* runner = nullptr;

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
  Block& here = block();
  Runner* before = set_runner(&here);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        here.shared(shared_bytes);
        here.run(threads.x * threads.y * threads.z, body);
      }
  set_runner(before);
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
const std::uint64_t* exchange(unsigned mask, std::uint64_t word) {
  return runner->exchange(mask, word);
}
unsigned match(unsigned mask, std::uint64_t word) {
  const std::uint64_t* words = exchange(mask, word);
  unsigned same = 0;
  for (unsigned l = 0; l < 32; ++l)
    if ((mask >> l & 1) != 0 && words[l] == word) same |= 1u << l;
  return same;
}
unsigned ballot(unsigned mask, bool predicate) {
  const unsigned same = match(mask, predicate ? 1 : 0);
  return predicate ? same : mask & ~same;
}

}  // namespace simt
