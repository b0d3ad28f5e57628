// Capacity: which assignments an expert takes. One block has one expert of one pool.

#include "kernels/ops/capacity.h"

#include <algorithm>
#include <bit>

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"
#include "kernels/ops/weight_order.h"

namespace upmoe::cuda {

namespace {

constexpr std::int64_t kMostGridRows = 65535;

struct Limits {
  std::int32_t* kept;
  float* lost;
  const std::int32_t *index, *row;
  const float* weight;  // nullptr: all alike
  std::int64_t pool, capacity, tokens;
  int k, experts;
};

// The pool's assignments in the order of places, first choices before second ones.
struct Assignment {
  std::int64_t at;
  std::int32_t expert;
  std::uint32_t key;  // a compared weight's bits: in the order of weights, which are not below 0
};
__device__ Assignment assignment(const Limits& l, std::int64_t i) {
  const std::int64_t place = static_cast<std::int64_t>(blockIdx.y) * l.pool + i % l.pool;
  const std::int64_t row = l.row[place];
  if (row < 0 || row >= l.tokens) return {-1, -1, 0};
  const std::int64_t at = row * l.k + i / l.pool;
  return {at, l.index[at],
          l.weight == nullptr ? 0u : std::bit_cast<std::uint32_t>(compared_weight(l.weight[at]))};
}

// How many of the expert's assignments have this key or a larger one; in every thread.
__device__ std::int64_t at_least(const Limits& l, int expert, std::uint32_t key, std::int64_t* memory) {
  std::int64_t count = 0;
  for (std::int64_t i = threadIdx.x; i < l.pool * l.k; i += kThreads) {
    const Assignment a = assignment(l, i);
    count += a.expert == expert && a.key >= key;
  }
  return block_sum(count, memory);
}

// How many threads in front of this one have `mine`, and how many of the whole block.
struct Before {
  int rank, total;
};
__device__ Before before(bool mine, int* memory) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned lanes = __ballot_sync(kAllLanes, mine);
  if (lane == 0) memory[warp] = __popc(lanes);
  __syncthreads();
  Before b{__popc(lanes & ((1u << lane) - 1)), 0};
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w < warp) b.rank += memory[w];
    b.total += memory[w];
  }
  __syncthreads();
  return b;
}

// An expert takes the assignments whose key is above a threshold, and of those at the threshold the first ones that
// there is room for. The threshold is found bit by bit: the largest key that `capacity` of them reach, 0 if there is
// none.
__global__ void limit(Limits l, FindingWords findings) {
  __shared__ std::int64_t counts[kThreads / kWarp];
  __shared__ int ranks[kThreads / kWarp];
  const int expert = static_cast<int>(blockIdx.x);
  std::uint32_t threshold = 0;
  std::int64_t room = l.capacity;
  if (l.weight != nullptr) {
    for (int bit = 30; bit >= kLeastComparedBit; --bit) {
      const std::uint32_t candidate = threshold | 1u << bit;
      if (at_least(l, expert, candidate, counts) >= l.capacity) threshold = candidate;
    }
    room -= at_least(l, expert, threshold + 1, counts);
  }
  std::int64_t taken = 0,
               lost = 0;  // of those at the threshold, by the blocks of threads so far; of this thread
  for (std::int64_t first = 0; first < l.pool * l.k; first += kThreads) {
    const std::int64_t i = first + threadIdx.x;
    const Assignment a = i < l.pool * l.k ? assignment(l, i) : Assignment{-1, -1, 0};
    const bool mine = a.expert == expert, tied = mine && a.key == threshold;
    const Before b = before(tied, ranks);
    const bool takes = mine && (a.key > threshold || (tied && taken + b.rank < room));
    taken += b.total;
    if (mine) l.kept[a.at] = takes ? expert : -1;
    lost += mine && !takes;
    // What is nobody's is the first block's to write.
    if (expert != 0 || a.at < 0 || (a.expert >= 0 && a.expert < l.experts)) continue;
    l.kept[a.at] = -1;
    if (a.expert != -1) find(findings, Finding::kIndex, a.at, static_cast<std::uint32_t>(a.expert));
  }
  lost = block_sum(lost, counts);
  if (threadIdx.x == 0)
    l.lost[static_cast<std::int64_t>(blockIdx.y) * l.experts + expert] = static_cast<float>(lost);
}

}  // namespace

void limit_choices(Exec& ex, TensorView kept_NK, TensorView lost_GE, const PooledChoices& choices,
                   const CapacityRule& rule) {
  const auto& [index_NK, weight_NK, row_N] = choices;
  Limits l{};
  l.kept = kept_NK.as<std::int32_t>();
  l.lost = lost_GE.as<float>();
  l.index = index_NK.as<std::int32_t>();
  l.row = row_N.as<std::int32_t>();
  l.weight = weight_NK.given() ? weight_NK.as<float>() : nullptr;
  l.pool = rule.pool;
  l.capacity = rule.capacity;
  l.tokens = index_NK.shape[0];
  l.k = static_cast<int>(index_NK.shape[1]);
  l.experts = static_cast<int>(lost_GE.shape[1]);
  stream_of(ex).limit(Finding::kIndex, l.experts);
  // A micro-batch may have more sequences, each a pool, than a grid has rows.
  for (std::int64_t left = lost_GE.shape[0]; left > 0; left -= kMostGridRows) {
    const auto pools = static_cast<unsigned>(std::min(left, kMostGridRows));
    launch(ex, dim3(static_cast<unsigned>(l.experts), pools), kThreads, limit, l, stream_of(ex).findings());
    l.row += pools * l.pool;
    l.lost += std::int64_t{pools} * l.experts;
  }
}

}  // namespace upmoe::cuda
