#pragma once
// The threads of one rank. The build without OpenMP runs the same loops on the calling thread.
// Bodies must not throw, and must not let a result depend on which thread ran them.

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace upmoe::cpu {

// Below this many elements a fork costs more than the work.
constexpr std::int64_t kSerialWork = 16384;

// body(i) for i in [0, n), contiguous shares. `work` is the elements one i touches.
template <class Body>
inline void parallel_for(std::int64_t n, std::int64_t work, Body&& body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (n > 1 && n * work >= kSerialWork)
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
