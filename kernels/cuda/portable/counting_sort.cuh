#pragma once
// A stable sort by small keys: where each of N items comes to lie. Three launches: how many items of each key
// every block of items has; where each block's items of each key begin; every item behind those before it.
// Sums are of integers, so the result does not depend on who comes first.

#include "kernels/cuda/runtime/launch.cuh"

namespace upmoe::cuda {

constexpr int kSortItems = 2048;  // of one block
constexpr int kSortWarps = kThreads / kWarp;
constexpr int kSortSegment = kSortItems / kSortWarps;  // items of one warp, one after the other
constexpr std::int64_t kMostKeys = 2048;

// Keys are functors: key(i) in [0, keys), or -1 for an item that is left out.
template <class Key>
__device__ void count_segment(int* count, const Key& key, std::int64_t items) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kSortItems + warp * kSortSegment;
  for (int i = lane; i < kSortSegment; i += kWarp) {
    const std::int64_t item = begin + i;
    const std::int32_t k = item < items ? key(item) : -1;
    if (k >= 0) atomicAdd(&count[k], 1);
  }
}

// counts[block][key].
template <class Key>
__global__ void count_keys(std::int32_t* counts, Key key, std::int64_t items, int keys) {
  int* count = dynamic_shared<int>();
  for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads) count[k] = 0;
  __syncthreads();
  count_segment(count, key, items);
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads)
    counts[static_cast<std::int64_t>(blockIdx.x) * keys + k] = count[k];
}

// Counts become places, in one block: keys in order, within a key the blocks in order. totals[key]: items of the key.
inline __global__ void place_keys(std::int32_t* counts, std::int32_t* totals, std::int64_t blocks, int keys) {
  int* first = dynamic_shared<int>();
  for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads) {
    std::int32_t total = 0;
    for (std::int64_t b = 0; b < blocks; ++b) total += counts[b * keys + k];
    totals[k] = total;
    first[k] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {  // a few hundred additions
    int next = 0;
    for (int k = 0; k < keys; ++k) {
      const int total = first[k];
      first[k] = next;
      next += total;
    }
  }
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads) {
    std::int32_t next = first[k];
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int32_t total = counts[b * keys + k];
      counts[b * keys + k] = next;
      next += total;
    }
  }
}

// place(i, p) for each item, p being its place; items that are left out have the place -1.
//
// A block has kSortItems items, each of its warps kSortSegment of them, one behind the other, and a row of next:
//   next[w][k] = begins[block][k]           items of key k in all blocks before
//              + count of k in warps < w    of this block, counted first
// Then a warp takes 32 items at a time. Lanes with one key find each other: the p-th of them has the place
// next[w][k] + p, and the first of them moves next[w][k] on by how many they are. Items of a key keep their order.
template <class Key, class Place>
__global__ void place_items(const std::int32_t* begins, Key key, Place place, std::int64_t items, int keys) {
  int* next = dynamic_shared<int>();  // [warp][key]
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int k = static_cast<int>(threadIdx.x); k < keys * kSortWarps; k += kThreads) next[k] = 0;
  __syncthreads();
  count_segment(next + warp * keys, key, items);
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < keys; k += kThreads) {
    int at = begins[static_cast<std::int64_t>(blockIdx.x) * keys + k];
    for (int w = 0; w < kSortWarps; ++w) {
      const int count = next[w * keys + k];
      next[w * keys + k] = at;
      at += count;
    }
  }
  __syncthreads();
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kSortItems + warp * kSortSegment;
  int* mine = next + warp * keys;
  for (int i = 0; i < kSortSegment; i += kWarp) {  // all lanes: they ask each other
    const std::int64_t item = begin + i + lane;
    const std::int32_t k = item < items ? key(item) : -1;
    const unsigned same = __match_any_sync(kAllLanes, k);
    const int before = __popc(same & ((1u << lane) - 1));
    const int first = k >= 0 ? mine[k] : 0;
    __syncwarp();
    if (k >= 0 && before == 0) mine[k] = first + __popc(same);
    __syncwarp();
    if (item < items) place(item, k >= 0 ? first + before : -1);
  }
}

// totals: `keys` int32 on the device.
template <class Key, class Place>
void counting_sort(const Exec& ex, std::int64_t items, std::int64_t keys, const Key& key, const Place& place,
                   std::int32_t* totals) {
  // Without keys (a node without experts) every item is left out.
  UPMOE_CHECK(keys >= 0 && keys <= kMostKeys, "{} keys, at most {} on a GPU", keys, kMostKeys);
  const std::int64_t blocks = blocks_for(items, kSortItems);
  const auto n = static_cast<int>(keys);
  const std::size_t row = static_cast<std::size_t>(keys) * sizeof(int);
  ScratchScope scope(*ex.scratch);
  auto* counts = ex.scratch->take({blocks, keys}, DType::kI32, "counts of a sort").as<std::int32_t>();
  launch_shared(ex, row, static_cast<unsigned>(blocks), kThreads, count_keys<Key>, counts, key, items, n);
  launch_shared(ex, row, 1, kThreads, place_keys, counts, totals, blocks, n);
  if (row * kSortWarps > 48 << 10)
    check(cudaFuncSetAttribute(place_items<Key, Place>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(row * kSortWarps)));
  launch_shared(ex, row * kSortWarps, static_cast<unsigned>(blocks), kThreads, place_items<Key, Place>,
                counts, key, place, items, n);
}

}  // namespace upmoe::cuda
