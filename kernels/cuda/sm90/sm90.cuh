#pragma once
// What the kernels of this folder share above single instructions: descriptors of operands in shared memory,
// the 128-byte swizzle, and counters of stages that go round.
//
// The swizzle: in every 1,024 bytes (eight rows of 128) the 16-byte chunk c of row r lies at chunk c ^ (r %
// 8), so that eight rows' chunks of one column are in different banks. The copy engine writes so, the tensor
// cores read so.

#include "kernels/cuda/sm90/sm90_ptx.cuh"

namespace upmoe::cuda::sm90 {

constexpr int kRowBytes = 128, kRowElements = 64;      // of a swizzled row of bf16
constexpr int kPanelBytes = kRowElements * kRowBytes;  // 64 such rows

// The byte of chunk `chunk` of row `row` in rows of 128 bytes.
__device__ constexpr u32 swizzled(u32 row, u32 chunk) {
  return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// An operand of wgmma under that swizzle. K-major: a row is one of M or N, 64 elements of K wide; every eight
// rows are `stride` bytes after the eight before, `leading` counts for nothing. MN-major: a row is one of K, 64
// elements of M or N wide; the next 64 of them are `leading` bytes further, the next eight of K `stride` bytes.
__device__ inline u64 descriptor(const void* operand, u32 leading, u32 stride) {
  constexpr u64 kSwizzle128 = u64{1} << 62;
  const auto field = [](u32 bytes) { return static_cast<u64>((bytes & 0x3ffffu) >> 4); };
  return field(shared_address(operand)) | field(leading) << 16 | field(stride) << 32 | kSwizzle128;
}
// Rows `row` on (a multiple of 8) and 16 elements of K from `k` on, of an operand that was loaded as rows of K.
__device__ inline u64 k_major(const unsigned char* operand, u32 row, u32 k) {
  return descriptor(operand + row * kRowBytes + k * 2, 16, 8 * kRowBytes);
}
// 16 elements of K from `k` on, of panels of 64 of M or N that each hold 64 elements of K.
__device__ inline u64 mn_major(const unsigned char* panels, u32 k) {
  return descriptor(panels + k * kRowBytes, kPanelBytes, 8 * kRowBytes);
}

// A stage of those that go round, and the parity of the phase that its barriers are in.
template <u32 kStages>
struct StageCounter {
  u32 stage = 0, parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ void skip(u32 stages) {
    const u32 to = stage + stages;
    stage = to % kStages;
    parity ^= to / kStages & 1;
  }
};

__device__ inline float low_of(u32 bf16_pair) {
  return __uint_as_float(bf16_pair << 16);
}
__device__ inline float high_of(u32 bf16_pair) {
  return __uint_as_float(bf16_pair & 0xffff0000u);
}
__device__ inline float sigmoid(float x) {
  constexpr float kLog2E = 1.44269504f;
  return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
}

}  // namespace upmoe::cuda::sm90
