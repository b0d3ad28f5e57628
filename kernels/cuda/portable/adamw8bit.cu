#include "kernels/ops/adamw8bit.h"

#include <algorithm>

#include "kernels/core/philox.h"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/adamw_factors.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/moment_codes.h"

namespace upmoe::cuda {

namespace {

// Where a rank's slice [0, n) lies among the blocks of 256 elements that share a scale. Blocks are counted from the
// beginning of the shard that the slice is cut from, so its first and last one may be cut:
//
//   shard    |      block 0      |      block 1      |      block 2      |
//   slice            [0 ............................... n)
//            <first>
//   warps            0 (a part)         1 (whole)          2 (a part)
//
// Whole blocks take the fast kernel, with wide loads and no questions; the at most two cut ones another launch each.
// A warp has one block of the moments, a lane eight neighbours in it.
constexpr int kEach = static_cast<int>(kMomentBlock) / kWarp;
constexpr int kWarps = kThreads / kWarp;

struct Moments {
  std::uint8_t *m, *v;
  float *m_scale, *v_scale;
  std::int64_t first, n, blocks;

  explicit Moments(const CodedMoments& c)
      : m(c.m_n.as<std::uint8_t>()),
        v(c.v_n.as<std::uint8_t>()),
        m_scale(c.m_scale_b.as<float>()),
        v_scale(c.v_scale_b.as<float>()),
        first(c.first),
        n(c.m_n.elements()),
        blocks(c.m_scale_b.elements()) {}
};

// The moments' blocks that a launch is for.
struct Blocks {
  std::int64_t begin, end;
};

// The lane's elements are [begin, begin + kEach) of the slice; those outside [0, n) are not its own.
struct Lane {
  std::int64_t block, begin;

  __device__ Lane(const Moments& s, const Blocks& blocks) {
    block = blocks.begin + static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    begin = (s.first / kMomentBlock + block) * kMomentBlock - s.first + threadIdx.x % kWarp * kEach;
  }
  __device__ bool has(const Moments& s, int j) const { return begin + j >= 0 && begin + j < s.n; }
};

// kWhole, here and below: the block has all its elements, and a lane's move as one.
template <bool kWhole, int N, class T>
__device__ void load_lane(float (&out)[N], const T* x, const Lane& lane, const Moments& s) {
  if constexpr (kWhole) {
    constexpr int kPart = sizeof(T) == 2 ? 8 : 4;
#pragma unroll
    for (int p = 0; p < N; p += kPart) {
      float part[kPart];
      load_floats(part, x + lane.begin + p);
#pragma unroll
      for (int j = 0; j < kPart; ++j) out[p + j] = part[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = lane.has(s, j) ? to_float(x[lane.begin + j]) : 0.0f;
  }
}
template <bool kWhole, int N, class T>
__device__ void store_lane(T* x, const Pack<T, N>& in, const Lane& lane, const Moments& s) {
  if constexpr (kWhole) {
    constexpr int kPart = 16 / static_cast<int>(sizeof(T)) < N ? 16 / static_cast<int>(sizeof(T)) : N;
#pragma unroll
    for (int p = 0; p < N; p += kPart)
      *reinterpret_cast<Pack<T, kPart>*>(x + lane.begin + p) =
          *reinterpret_cast<const Pack<T, kPart>*>(in.at + p);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (lane.has(s, j)) x[lane.begin + j] = in.at[j];
  }
}
// Four codes in a word, the first one lowest. The first moment's have a sign in the uppermost bit.
template <int Top, bool kSigned>
__device__ float decode_byte(std::uint32_t word, int byte) {
  // The code's byte is moved to bits 20 to 27 (without the sign: 20 to 26), where decode_fine expects it.
  const std::uint32_t fine =
      (byte < 3 ? word << (20 - 8 * byte) : word >> 4) & (kSigned ? 0x07f00000u : 0x0ff00000u);
  const float size = decode_fine<Top>(fine);
  if constexpr (!kSigned) return size;
  const std::uint32_t sign = word << (24 - 8 * byte) & 0x80000000u;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(size) | sign);
}

template <bool kWhole>
__device__ void decode(float (&m)[kEach], float (&v)[kEach], const Lane& lane, const Moments& s) {
  const float m_scale = s.m_scale[lane.block], v_scale = s.v_scale[lane.block];
  if constexpr (kWhole) {
    using Words = Pack<std::uint32_t, kEach / 4>;
    const Words m_words = *reinterpret_cast<const Words*>(s.m + lane.begin),
                v_words = *reinterpret_cast<const Words*>(s.v + lane.begin);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      m[j] = decode_byte<15, true>(m_words.at[j / 4], j % 4) * m_scale;
      v[j] = decode_byte<31, false>(v_words.at[j / 4], j % 4) * v_scale;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      m[j] = lane.has(s, j) ? decode_first<true>(s.m[lane.begin + j]) * m_scale : 0.0f;
      v[j] = lane.has(s, j) ? decode_second<true>(s.v[lane.begin + j]) * v_scale : 0.0f;
    }
  }
}

__device__ float largest(const float (&x)[kEach]) {
  float most = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) most = fmaxf(most, fabsf(x[j]));
  return warp_max(most);
}

template <bool kWhole>
__device__ void encode(const Moments& s, const Lane& lane, const float (&m)[kEach], const float (&v)[kEach],
                       const std::uint32_t (&m_random)[kEach], const std::uint32_t (&v_random)[kEach]) {
  // A block's largest becomes 1, the top of the codes. It changes with each step, so all of the block is coded anew.
  const float m_scale = largest(m), v_scale = largest(v);
  const float m_inverse = inverse_of_scale(m_scale), v_inverse = inverse_of_scale(v_scale);
  Pack<std::uint8_t, kEach> m_codes, v_codes;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    m_codes.at[j] = encode_first<true>(m[j] * m_inverse, m_random[j]);
    v_codes.at[j] = encode_second<true>(v[j] * v_inverse, v_random[j]);
  }
  store_lane<kWhole>(s.m, m_codes, lane, s);
  store_lane<kWhole>(s.v, v_codes, lane, s);
  if (threadIdx.x % kWarp == 0) {
    s.m_scale[lane.block] = m_scale;
    s.v_scale[lane.block] = v_scale;
  }
}

__device__ float round_weight(float, float x, std::uint32_t) {
  return x;
}
__device__ bf16 round_weight(bf16, float x, std::uint32_t random) {
  return round_by_chance(x, random);
}

// The random bits of the lane's elements: a counter for every four neighbours in the whole tensor.
template <bool kWhole>
__device__ void draw(std::uint32_t (&bits)[kEach], const Lane& lane, const Moments& s, const Chance& chance,
                     std::uint64_t step) {
  if constexpr (kWhole) {
    const auto counter = static_cast<std::uint64_t>(chance.index.at(s.first + lane.begin) / 4);
#pragma unroll
    for (int j = 0; j < kEach; j += 4) {
      const Philox4 four =
          philox<kRoundingRounds>(chance.key, counter + static_cast<std::uint64_t>(j / 4), step);
#pragma unroll
      for (int k = 0; k < 4; ++k) bits[j + k] = four[k];
    }
  } else {
    Philox4 four{};
    std::int64_t counter = -1;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (!lane.has(s, j)) continue;
      const std::int64_t place = chance.index.at(s.first + lane.begin + j);
      if (place / 4 != counter) {
        counter = place / 4;
        four = philox<kRoundingRounds>(chance.key, static_cast<std::uint64_t>(counter), step);
      }
      const int of_four = static_cast<int>(place % 4);  // chosen, not indexed: registers have no addresses
      bits[j] = of_four == 0 ? four[0] : of_four == 1 ? four[1] : of_four == 2 ? four[2] : four[3];
    }
  }
}

template <bool kWhole, class Weight, class Grad>
__global__ void adamw8bit_kernel(Weight* weight, Moments s, Blocks blocks, const Grad* grad, AdamWFactors f,
                                 const __grid_constant__ Chance chance, std::uint64_t step) {
  const Lane lane(s, blocks);
  if (lane.block >= blocks.end) return;  // a whole warp
  float g[kEach], m[kEach], v[kEach], w[kEach];
  load_lane<kWhole>(g, grad, lane, s);
  load_lane<kWhole>(w, weight, lane, s);
  decode<kWhole>(m, v, lane, s);
  std::uint32_t bits[kEach] = {}, m_random[kEach], v_random[kEach];
  draw<kWhole>(bits, lane, s, chance, step);
  Pack<Weight, kEach> updated;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    g[j] *= f.grad_scale;
    m[j] = fmaf(f.one_minus_beta1, g[j], f.beta1 * m[j]);
    v[j] = fmaf(f.one_minus_beta2 * g[j], g[j], f.beta2 * v[j]);
    const float divisor = fmaf(sqrtf(v[j]), f.inverse_sqrt_bias2, f.eps);
    updated.at[j] =
        round_weight(Weight{}, fmaf(-f.step_size, m[j] / divisor, w[j] * f.keep), bits[j] & 0xffffu);
    m_random[j] = bits[j] >> 16 & 0xffu;
    v_random[j] = bits[j] >> 24;
  }
  store_lane<kWhole>(weight, updated, lane, s);
  encode<kWhole>(s, lane, m, v, m_random, v_random);
}

__global__ void encode_kernel(Moments s, Blocks blocks, const float* m_n, const float* v_n) {
  const Lane lane(s, blocks);
  if (lane.block >= blocks.end) return;
  float m[kEach], v[kEach];
  load_lane<false>(m, m_n, lane, s);
  load_lane<false>(v, v_n, lane, s);
  std::uint32_t nearest[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) nearest[j] = kNearest;
  encode<false>(s, lane, m, v, nearest, nearest);
}

__global__ void decode_kernel(float* m_n, float* v_n, Moments s, Blocks blocks) {
  const Lane lane(s, blocks);
  if (lane.block >= blocks.end) return;
  float m[kEach], v[kEach];
  decode<false>(m, v, lane, s);
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (lane.has(s, j)) {
      m_n[lane.begin + j] = m[j];
      v_n[lane.begin + j] = v[j];
    }
}

unsigned grid_of(const Blocks& blocks) {
  return blocks_for(blocks.end - blocks.begin, kWarps);
}

// The blocks that have all their elements: all but the first and the last one, at most.
Blocks whole_blocks(const Moments& s) {
  const std::int64_t begin = s.first % kMomentBlock == 0 ? 0 : 1,
                     end = (s.first + s.n) / kMomentBlock - s.first / kMomentBlock;
  return {std::min(begin, s.blocks), std::max(std::min(begin, s.blocks), end)};
}

template <class Weight, class Grad>
void update(const Exec& ex, Weight* weight, const Moments& s, const Grad* grad, const AdamWStep& step,
            const Chance& chance) {
  const AdamWFactors factors(step);
  const bool wide = s.first % kEach == 0 && chance.index.in_eights() && packs<kPack<Weight>>(kEach, weight) &&
                    packs<kPack<Grad>>(kEach, grad) && packs<kEach>(kEach, s.m, s.v);
  const Blocks whole = wide ? whole_blocks(s) : Blocks{0, 0};
  const auto number = static_cast<std::uint64_t>(step.step);
  launch(ex, grid_of(whole), kThreads, adamw8bit_kernel<true, Weight, Grad>, weight, s, whole, grad, factors,
         chance, number);
  // Of a slice that is not aligned, everything: `whole` is empty then.
  for (const Blocks& rest : {Blocks{0, whole.begin}, Blocks{whole.end, s.blocks}})
    launch(ex, grid_of(rest), kThreads, adamw8bit_kernel<false, Weight, Grad>, weight, s, rest, grad, factors,
           chance, number);
}

}  // namespace

void adamw8bit(Exec& ex, TensorView weight, const CodedMoments& moments, ConstTensorView grad,
               const AdamWStep& step, const Chance& chance) {
  with_float_type(weight.dtype, [&](auto weight_type) {
    with_float_type(grad.dtype, [&](auto grad_type) {
      update(ex, weight.as<decltype(weight_type)>(), Moments(moments), grad.as<decltype(grad_type)>(), step,
             chance);
    });
  });
}

void encode_moments(Exec& ex, const CodedMoments& moments, ConstTensorView m_n, ConstTensorView v_n) {
  const Moments s(moments);
  const Blocks all{0, s.blocks};
  launch(ex, grid_of(all), kThreads, encode_kernel, s, all, m_n.as<float>(), v_n.as<float>());
}

void decode_moments(Exec& ex, TensorView m_n, TensorView v_n, const CodedMoments& moments) {
  const Moments s(moments);
  const Blocks all{0, s.blocks};
  launch(ex, grid_of(all), kThreads, decode_kernel, m_n.as<float>(), v_n.as<float>(), s, all);
}

}  // namespace upmoe::cuda
