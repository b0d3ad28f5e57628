#pragma once
// The threads of one rank. The build without OpenMP runs the same loops on the calling thread.
// Bodies must not throw, and must not let a result depend on which thread ran them.

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>
#endif

namespace upmoe::cpu {

// Below this many elements a fork costs more than the work.
constexpr std::int64_t kSerialWork = 16384;

#ifdef _OPENMP
// What is left of a thread's share of a loop, on a cache line of its own.
struct alignas(64) LoopShare {
  std::int64_t next, end;
};

// Contiguous shares, one for each thread, in this thread's memory, which its next loop overwrites.
inline std::vector<LoopShare>& loop_shares(std::int64_t n, std::int64_t threads) {
  static thread_local std::vector<LoopShare> shares;
  shares.resize(static_cast<std::size_t>(threads));
  for (std::int64_t i = 0; i < threads; ++i)
    shares[static_cast<std::size_t>(i)] = {i * n / threads, (i + 1) * n / threads};
  return shares;
}

// Every thread goes through its own share, which is the same in every loop over as much, and then helps where work is
// left: cores are not equally fast, as those of a laptop are not, or those that a virtual machine shares with others.
template <class Body>
inline void run_shares(std::int64_t n, std::int64_t work, const Body& body) {
  constexpr std::int64_t kPartsOfShare = 8, kPartWork = kSerialWork / 8;  // what is taken at once
  const std::int64_t threads = omp_get_max_threads();
  const std::int64_t part =
      std::max({std::int64_t{1}, n / (threads * kPartsOfShare), kPartWork / std::max<std::int64_t>(1, work)});
  std::vector<LoopShare>& shares = loop_shares(n, threads);
#pragma omp parallel
  for (std::int64_t i = 0; i < threads; ++i) {
    LoopShare& share = shares[static_cast<std::size_t>((omp_get_thread_num() + i) % threads)];
    const std::atomic_ref<std::int64_t> next(share.next);
    for (std::int64_t first; (first = next.fetch_add(part, std::memory_order_relaxed)) < share.end;)
      for (std::int64_t k = first; k < std::min(first + part, share.end); ++k) body(k);
  }
}
#endif

// body(i) for i in [0, n), contiguous parts. `work` is the elements one i touches.
template <class Body>
inline void parallel_for(std::int64_t n, std::int64_t work, Body&& body) {
#ifdef _OPENMP
  if (n > 1 && n * work >= kSerialWork && omp_get_max_threads() > 1 && !omp_in_parallel())
    return run_shares(n, work, body);
#else
  static_cast<void>(work);
#endif
  for (std::int64_t i = 0; i < n; ++i) body(i);
}

// Upper bound of the `worker` that parallel_tasks hands out, plus one: how many workspaces to take.
inline std::int64_t worker_count() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// body(i, worker) for i in [0, n), whoever is free takes the next: for tasks of unequal size.
template <class Body>
inline void parallel_tasks(std::int64_t n, Body&& body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
  for (std::int64_t i = 0; i < n; ++i) body(i, static_cast<std::int64_t>(omp_get_thread_num()));
#else
  for (std::int64_t i = 0; i < n; ++i) body(i, std::int64_t{0});
#endif
}

}  // namespace upmoe::cpu
