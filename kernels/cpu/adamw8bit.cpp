#include "kernels/ops/adamw8bit.h"

#include <algorithm>
#include <cmath>

#include "kernels/core/philox.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/adamw_factors.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/moment_codes.h"

namespace upmoe::cpu {

namespace {

// One block's part of the slice: elements [begin, begin + count) of it.
struct Block {
  std::int64_t number, begin, count;
};

Block block_of(const CodedMoments& moments, std::int64_t number) {
  // Blocks are counted from the shard's beginning: the slice's first one may begin before the slice, its last end
  // behind.
  const std::int64_t at = (moments.first / kMomentBlock + number) * kMomentBlock - moments.first;
  const std::int64_t begin = std::max<std::int64_t>(at, 0);
  return {number, begin, std::min(at + kMomentBlock, moments.m_n.elements()) - begin};
}

template <class Body>
void for_blocks(const CodedMoments& moments, const Body& body) {
  parallel_for(moments.m_scale_b.elements(), kMomentBlock,
               [&](std::int64_t number) { body(block_of(moments, number)); });
}

// The random bits of each element (rounding_bits).
void draw_each(std::uint32_t* bits, const Block& block, std::int64_t first, const Chance& chance,
               std::uint64_t step) {
  Philox4 words{};
  std::int64_t counter = -1;
  for (std::int64_t i = 0; i < block.count; ++i) {
    const std::int64_t place = chance.index.at(first + block.begin + i);
    if (place / kRoundedAtOnce != counter) {
      counter = place / kRoundedAtOnce;
      words = philox<kRoundingRounds>(chance.key, static_cast<std::uint64_t>(counter), step);
    }
    const int neighbour = static_cast<int>(place % kRoundedAtOnce);
    bits[i] = rounding_bits(words[static_cast<std::size_t>(neighbour / 2)], neighbour);
  }
}

// Of neighbours in the whole tensor, from `place` on: its words, one after the other, serve two of them each.
void draw_neighbours(std::uint32_t* bits, std::int64_t place, std::int64_t count, std::uint64_t key,
                     std::uint64_t step) {
  constexpr std::int64_t kMost = kMomentBlock / kRoundedAtOnce + 1;
  std::uint32_t words[kMost * 4];
  const std::int64_t first = place / kRoundedAtOnce, last = (place + count - 1) / kRoundedAtOnce;
  for (std::int64_t c = 0; c <= last - first; ++c) {
    const Philox4 four = philox<kRoundingRounds>(key, static_cast<std::uint64_t>(first + c), step);
    for (std::size_t w = 0; w < 4; ++w) words[static_cast<std::size_t>(4 * c) + w] = four[w];
  }
  std::uint32_t all[kMost * kRoundedAtOnce];
  for (std::int64_t w = 0; w < 4 * (last - first + 1); ++w) {
    all[2 * w] = rounding_bits(words[w], 0);
    all[2 * w + 1] = rounding_bits(words[w], 1);
  }
  std::copy_n(all + place % kRoundedAtOnce, count, bits);
}

void draw(std::uint32_t* bits, const Block& block, std::int64_t first, const Chance& chance,
          std::uint64_t step) {
  if (block.count == 0) return;
  const std::int64_t begin = chance.index.at(first + block.begin),
                     last = chance.index.at(first + block.begin + block.count - 1);
  if (last - begin == block.count - 1) return draw_neighbours(bits, begin, block.count, chance.key, step);
  draw_each(bits, block, first, chance, step);
}

float largest(const float* x, std::int64_t count) {
  f32x16 most{};
  for_lanes(count, [&](std::int64_t i, auto lanes) {
    const f32x16 size = std::bit_cast<f32x16>(std::bit_cast<u32x16>(load(x + i, lanes)) & 0x7fffffffu);
    most = max(size, most);  // in this order: passes over NaN
  });
  return reduce_max(most);
}

// bits: of each element. A loop over numbers of one size, which the compiler makes vectors of; bytes go in and out
// apart.
void encode(const CodedMoments& moments, const Block& block, const float* m, const float* v,
            const std::uint32_t* bits) {
  const float m_scale = largest(m, block.count), v_scale = largest(v, block.count);
  const float m_inverse = inverse_of_scale(m_scale), v_inverse = inverse_of_scale(v_scale);
  moments.m_scale_b.as<float>()[block.number] = m_scale;
  moments.v_scale_b.as<float>()[block.number] = v_scale;
  std::uint32_t m_codes[kMomentBlock], v_codes[kMomentBlock];
  for (std::int64_t i = 0; i < block.count; ++i) {
    m_codes[i] = encode_first(m[i] * m_inverse, bits[i] >> 16 & 0xffu);
    v_codes[i] = encode_second(v[i] * v_inverse, bits[i] >> 24);
  }
  std::copy_n(m_codes, block.count, moments.m_n.as<std::uint8_t>() + block.begin);
  std::copy_n(v_codes, block.count, moments.v_n.as<std::uint8_t>() + block.begin);
}

// Times m_factor and v_factor, which join the block's scales.
void decode(const CodedMoments& moments, const Block& block, float* m, float* v, float m_factor,
            float v_factor) {
  const float m_scale = moments.m_scale_b.as<float>()[block.number] * m_factor,
              v_scale = moments.v_scale_b.as<float>()[block.number] * v_factor;
  std::uint32_t m_codes[kMomentBlock], v_codes[kMomentBlock];
  std::copy_n(moments.m_n.as<std::uint8_t>() + block.begin, block.count, m_codes);
  std::copy_n(moments.v_n.as<std::uint8_t>() + block.begin, block.count, v_codes);
  for (std::int64_t i = 0; i < block.count; ++i) {
    m[i] = decode_first(static_cast<std::uint8_t>(m_codes[i])) * m_scale;
    v[i] = decode_second(static_cast<std::uint8_t>(v_codes[i])) * v_scale;
  }
}

void round_weight(float& to, float x, std::uint32_t) {
  to = x;
}
void round_weight(bf16& to, float x, std::uint32_t random) {
  to = round_by_chance(x, random);
}

// Explicit fused multiply-adds: the GPU's result has the same bits.
template <class Weight, class Grad>
void update(const CodedMoments& moments, const Block& block, Weight* weight, const Grad* grad,
            const std::uint32_t* bits, const AdamWFactors& f) {
  float m[kMomentBlock], v[kMomentBlock];
  decode(moments, block, m, v, f.beta1, f.beta2);
  for (std::int64_t i = 0; i < block.count; ++i) {
    const float g = to_float(grad[i]) * f.grad_scale;
    m[i] = std::fma(f.one_minus_beta1, g, m[i]);
    v[i] = std::fma(f.one_minus_beta2 * g, g, v[i]);
    const float divisor = std::fma(newton_root(v[i]), f.inverse_sqrt_bias2, f.eps);
    const float w = std::fma(-f.step_size, m[i] * newton_reciprocal(divisor), to_float(weight[i]) * f.keep);
    round_weight(weight[i], w, bits[i] & 0xffffu);
  }
  encode(moments, block, m, v, bits);
}

}  // namespace

void adamw8bit(Exec&, TensorView weight, const CodedMoments& moments, ConstTensorView grad,
               const AdamWStep& step, const Chance& chance) {
  const AdamWFactors factors(step);
  with_float_type(weight.dtype, [&](auto weight_type) {
    with_float_type(grad.dtype, [&](auto grad_type) {
      auto* weight_of = weight.as<decltype(weight_type)>();
      const auto* grad_of = grad.as<decltype(grad_type)>();
      for_blocks(moments, [&](const Block& block) {
        std::uint32_t bits[kMomentBlock];
        draw(bits, block, moments.first, chance, static_cast<std::uint64_t>(step.step));
        update(moments, block, weight_of + block.begin, grad_of + block.begin, bits, factors);
      });
    });
  });
}

void encode_moments(Exec&, const CodedMoments& moments, ConstTensorView m_n, ConstTensorView v_n) {
  std::uint32_t nearest[kMomentBlock];
  std::fill_n(nearest, kMomentBlock, kNearest << 16 | kNearest << 24);
  for_blocks(moments, [&](const Block& block) {
    encode(moments, block, m_n.as<float>() + block.begin, v_n.as<float>() + block.begin, nearest);
  });
}

void decode_moments(Exec&, TensorView m_n, TensorView v_n, const CodedMoments& moments) {
  for_blocks(moments, [&](const Block& block) {
    decode(moments, block, m_n.as<float>() + block.begin, v_n.as<float>() + block.begin, 1.0f, 1.0f);
  });
}

}  // namespace upmoe::cpu
