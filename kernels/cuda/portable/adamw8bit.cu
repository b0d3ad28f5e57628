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

__device__ inline std::int64_t warp_number() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

// The lane's elements are [begin, begin + kEach) of the slice; those outside [0, n) are not its own.
struct Lane {
  std::int64_t block, begin;

  __device__ Lane(const Moments& s, std::int64_t number)
      : block(number), begin(begin_of_block(s, number) - s.first + threadIdx.x % kWarp * kEach) {}
  // In the shard.
  __device__ static std::int64_t begin_of_block(const Moments& s, std::int64_t number) {
    return (s.first / kMomentBlock + number) * kMomentBlock;
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

// Times m_factor and v_factor, which join the block's scales.
template <bool kWhole>
__device__ void decode(float (&m)[kEach], float (&v)[kEach], const Lane& lane, const Moments& s,
                       float m_factor, float v_factor) {
  const float m_scale = s.m_scale[lane.block] * m_factor, v_scale = s.v_scale[lane.block] * v_factor;
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

// What the bits of a rounding are drawn from.
struct Draw {
  Chance chance;
  std::uint64_t step;
  bool blocks_lie_together;  // in the whole tensor, as they do in the shard
};

// The random bits of a lane's elements, which are as many as share a counter and lie from `place` on in the tensor.
__device__ inline void draw_whole(std::uint32_t (&bits)[kEach], std::int64_t place, const Draw& from) {
  static_assert(kEach == kRoundedAtOnce);
  const Philox4 words =
      philox<kRoundingRounds>(from.chance.key, static_cast<std::uint64_t>(place) / kRoundedAtOnce, from.step);
#pragma unroll
  for (int j = 0; j < kEach; ++j) bits[j] = rounding_bits(words[j / 2], j);
}
// Of a lane whose elements may lie anywhere.
__device__ inline void draw_each(std::uint32_t (&bits)[kEach], const Lane& lane, const Moments& s,
                                 const Draw& from) {
  Philox4 words{};
  std::int64_t counter = -1;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (!lane.has(s, j)) continue;
    const std::int64_t place = from.chance.index.at(s.first + lane.begin + j);
    if (place / kRoundedAtOnce != counter) {
      counter = place / kRoundedAtOnce;
      words = philox<kRoundingRounds>(from.chance.key, static_cast<std::uint64_t>(counter), from.step);
    }
    const int i = static_cast<int>(place % kRoundedAtOnce);
    // Chosen, not indexed: registers have no addresses.
    bits[j] = rounding_bits(i < 2 ? words[0] : i < 4 ? words[1] : i < 6 ? words[2] : words[3], i);
  }
}

template <bool kWhole, class Weight, class Grad>
__device__ void update_block(Weight* weight, const Moments& s, const Lane& lane, const Grad* grad,
                             const AdamWFactors& f, const std::uint32_t (&bits)[kEach]) {
  float g[kEach], m[kEach], v[kEach], w[kEach];
  load_lane<kWhole>(g, grad, lane, s);
  load_lane<kWhole>(w, weight, lane, s);
  decode<kWhole>(m, v, lane, s, f.beta1, f.beta2);
  std::uint32_t m_random[kEach], v_random[kEach];
  Pack<Weight, kEach> updated;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    g[j] *= f.grad_scale;
    m[j] = fmaf(f.one_minus_beta1, g[j], m[j]);
    v[j] = fmaf(f.one_minus_beta2 * g[j], g[j], v[j]);
    const float divisor = fmaf(newton_root(v[j]), f.inverse_sqrt_bias2, f.eps);
    updated.at[j] = round_weight(
        Weight{}, fmaf(-f.step_size, m[j] * newton_reciprocal(divisor), w[j] * f.keep), bits[j] & 0xffffu);
    m_random[j] = bits[j] >> 16 & 0xffu;
    v_random[j] = bits[j] >> 24;
  }
  store_lane<kWhole>(weight, updated, lane, s);
  encode<kWhole>(s, lane, m, v, m_random, v_random);
}

// A warp takes kBlocksOfWarp blocks, one after the other. Where they begin in the whole tensor takes divisions by the
// shard's extents: where a block lies there in one piece, a lane asks for one block and tells the others.
//
//   lane 0 .. 7     where blocks first + 0 .. 7 begin          once
//   all lanes       block first + b: lane b's answer + 8 lane  for every b
constexpr int kBlocksOfWarp = 8;

template <bool kWhole, class Weight, class Grad>
__global__ void adamw8bit_kernel(Weight* weight, Moments s, Blocks blocks, const Grad* grad, AdamWFactors f,
                                 const __grid_constant__ Draw from) {
  const std::int64_t first = blocks.begin + warp_number() * kBlocksOfWarp;
  const int in_warp = static_cast<int>(threadIdx.x) % kWarp;
  const FlatIndex& index = from.chance.index;
  std::int64_t mine = 0;
  if (kWhole && from.blocks_lie_together)
    mine = index.at(Lane::begin_of_block(s, first + in_warp % kBlocksOfWarp));
#pragma unroll 1
  for (int b = 0; b < kBlocksOfWarp && first + b < blocks.end; ++b) {  // the same for a whole warp
    const Lane lane(s, first + b);
    std::uint32_t bits[kEach] = {};
    if constexpr (kWhole) {
      draw_whole(bits,
                 from.blocks_lie_together ? __shfl_sync(kAllLanes, mine, b) + in_warp * kEach
                                          : index.at(s.first + lane.begin),
                 from);
    } else {
      draw_each(bits, lane, s, from);
    }
    update_block<kWhole>(weight, s, lane, grad, f, bits);
  }
}

__global__ void encode_kernel(Moments s, Blocks blocks, const float* m_n, const float* v_n) {
  const Lane lane(s, blocks.begin + warp_number());
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
  const Lane lane(s, blocks.begin + warp_number());
  if (lane.block >= blocks.end) return;
  float m[kEach], v[kEach];
  decode<false>(m, v, lane, s, 1.0f, 1.0f);
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (lane.has(s, j)) {
      m_n[lane.begin + j] = m[j];
      v_n[lane.begin + j] = v[j];
    }
}

unsigned grid_of(const Blocks& blocks, int of_warp = 1) {
  return blocks_for(blocks.end - blocks.begin, kWarps * of_warp);
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
  const bool wide = s.first % kEach == 0 && chance.index.in_runs_of(kRoundedAtOnce) &&
                    packs<kPack<Weight>>(kEach, weight) && packs<kPack<Grad>>(kEach, grad) &&
                    packs<kEach>(kEach, s.m, s.v);
  const Blocks whole = wide ? whole_blocks(s) : Blocks{0, 0};
  const Draw from{chance, static_cast<std::uint64_t>(step.step), chance.index.in_runs_of(kMomentBlock)};
  launch(ex, grid_of(whole, kBlocksOfWarp), kThreads, adamw8bit_kernel<true, Weight, Grad>, weight, s, whole,
         grad, factors, from);
  // Of a slice that is not aligned, everything: `whole` is empty then.
  for (const Blocks& rest : {Blocks{0, whole.begin}, Blocks{whole.end, s.blocks}})
    launch(ex, grid_of(rest, kBlocksOfWarp), kThreads, adamw8bit_kernel<false, Weight, Grad>, weight, s, rest,
           grad, factors, from);
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
