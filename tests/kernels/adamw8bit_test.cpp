#include "kernels/ops/adamw8bit.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <set>

#include "kernels/core/philox.h"
#include "kernels/ops/moment_codes.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_linear.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

template <class Decode>
std::vector<double> values_of_codes(int codes, const Decode& decode) {
  std::vector<double> all;
  for (int c = 0; c < codes; ++c) all.push_back(static_cast<double>(decode(static_cast<std::uint8_t>(c))));
  return all;
}

TEST(MomentCodes, RiseToOne) {
  const std::vector<double> first = values_of_codes(121, decode_first),
                            second = values_of_codes(249, decode_second);
  for (const auto& all : {first, second}) {
    EXPECT_EQ(all.front(), 0);
    EXPECT_EQ(all.back(), 1);
    for (std::size_t i = 1; i < all.size(); ++i) EXPECT_LT(all[i - 1], all[i]) << i;
  }
  EXPECT_EQ(first[1], std::ldexp(1.0, -17));
  EXPECT_EQ(second[1], std::ldexp(1.0, -33));
  EXPECT_EQ(decode_first(0x80 | 120), -1.0f);
}

// Every code, a little above and below too, comes back; whatever the chance, nothing moves by more than a step.
TEST(MomentCodes, ComeBack) {
  for (std::uint32_t random : {0u, 77u, kNearest, 255u}) {
    for (int c = 0; c <= 120; ++c)
      for (float nudge : {1.0f, 1.0f + 0x1p-23f, 1.0f - 0x1p-23f}) {
        const auto code = static_cast<std::uint8_t>(c);
        const float x = decode_first(code) * nudge;
        if (random == kNearest || (c > 8 && x <= 1)) {
          EXPECT_EQ(encode_first(x, random), code) << x;
          EXPECT_EQ(encode_first(-x, random), c == 0 ? 0x80 : code | 0x80) << x;
        }
      }
    for (int c = 0; c <= 248; ++c) {
      const float x = decode_second(static_cast<std::uint8_t>(c));
      EXPECT_EQ(encode_second(x, random), c);
    }
  }
  EXPECT_EQ(encode_second(1e-30f, 0), 1) << "not nothing";
  EXPECT_EQ(encode_second(0.0f, 255), 0);
  EXPECT_EQ(encode_first(1.0000002f, 255), 120);
}

// The way over denormal numbers has the same codes and values: around every code, below the smallest one, and
// for what rounding lifts above 1.
TEST(MomentCodes, BothWaysAreTheSame) {
  for (int c = 0; c < 256; ++c) {
    const auto code = static_cast<std::uint8_t>(c);
    EXPECT_EQ(decode_first<true>(code), decode_first(code)) << c;
    EXPECT_EQ(decode_second<true>(code), decode_second(code)) << c;
  }
  std::vector<float> values{0.0f, 1.0f, 1.0000001f, 1.0000002f, 1e-30f, 1e-38f, 1e-40f, 1.4e-45f};
  for (int c = 1; c <= 248; ++c)
    for (const float x : {decode_second(static_cast<std::uint8_t>(c)),
                          decode_first(static_cast<std::uint8_t>(c <= 120 ? c : 120))})
      for (const float near : {std::nextafter(x, 0.0f), x, std::nextafter(x, 2.0f), x * 1.0625f}) {
        values.push_back(near);
        values.push_back(near * 1.03125f);
      }
  for (std::uint64_t i = 0; i < 2000; ++i) {
    const auto bits = philox(5, i);
    values.push_back(uniform_from_bits(bits[0]) * std::ldexp(1.0f, -static_cast<int>(bits[1] % 50)));
  }
  for (const float x : values)
    for (const std::uint32_t random : {0u, 1u, 77u, kNearest, 254u, 255u}) {
      ASSERT_EQ(encode_first<true>(x, random), encode_first(x, random)) << x << " " << random;
      ASSERT_EQ(encode_first<true>(-x, random), encode_first(-x, random)) << x << " " << random;
      ASSERT_EQ(encode_second<true>(x, random), encode_second(x, random)) << x << " " << random;
    }
}

// Over all chances, the mean of the codes is the value; nearest is within half a step.
TEST(MomentCodes, MeanWhatTheyRound) {
  for (std::uint64_t i = 0; i < 500; ++i) {
    const auto bits = philox(3, i);
    const float x = uniform_from_bits(bits[0]) * std::ldexp(1.0f, -static_cast<int>(bits[1] % 16));
    double first = 0, second = 0;
    for (std::uint32_t random = 0; random < 256; ++random) {
      first += static_cast<double>(decode_first(encode_first(x, random))) / 256;
      second += static_cast<double>(decode_second(encode_second(x, random))) / 256;
    }
    const double step = std::max(static_cast<double>(x) / 8, std::ldexp(1.0, -17));
    EXPECT_NEAR(first, static_cast<double>(x), step / 200) << x;
    EXPECT_NEAR(second, static_cast<double>(x), static_cast<double>(x) / 8 / 200) << x;
    EXPECT_LE(std::abs(decode_first(encode_first(x, kNearest)) - x), step / 2 * 1.001);
  }
}

// Eight neighbours take each of 128 bits twice: for a weight, and for the moments of another one.
TEST(MomentCodes, NeighboursShareACall) {
  std::array<int, 128> of_weights{}, of_moments{};
  for (int i = 0; i < kRoundedAtOnce; ++i)
    for (int word = 0; word < 4; ++word)
      for (int bit = 0; bit < 32; ++bit) {
        const std::uint32_t bits = i / 2 == word ? rounding_bits(1u << bit, i) : 0;
        of_weights[static_cast<std::size_t>(32 * word + bit)] += (bits & 0xffffu) != 0;
        of_moments[static_cast<std::size_t>(32 * word + bit)] += bits >> 16 != 0;
      }
  for (std::size_t b = 0; b < of_weights.size(); ++b) {
    EXPECT_EQ(of_weights[b], 1) << b;
    EXPECT_EQ(of_moments[b], 1) << b;
  }
}

TEST(MomentCodes, WeightsAreRoundedByChance) {
  for (const float x : {1.0f, -1.0f, 0.0f, 3.140625f, 1e-40f}) {
    const float exact = to_float(to_bf16(x));
    for (std::uint32_t random : {0u, 1u, 65535u})
      EXPECT_EQ(to_float(round_by_chance(exact, random)), exact) << "what needs no rounding";
  }
  const float x = 1.0f + 0.3f / 128;  // three tenths of the way to the next one
  double sum = 0;
  for (std::uint32_t random = 0; random < 65536; ++random)
    sum += static_cast<double>(to_float(round_by_chance(-x, random)));
  EXPECT_NEAR(sum / 65536, static_cast<double>(-x), 1e-6);
  EXPECT_TRUE(std::isnan(to_float(round_by_chance(std::nanf(""), 65535))));
  EXPECT_TRUE(std::isinf(to_float(round_by_chance(INFINITY, 65535))));
}

TEST(FlatIndex, OfShards) {
  // Rows 2 to 4 of a matrix: they lie together.
  const FlatIndex rows({2, 0}, {3, 7}, {9, 7});
  EXPECT_EQ(rows.dims, 1);
  EXPECT_EQ(rows.at(0), 14);
  EXPECT_EQ(rows.at(20), 34);
  for (const auto& [offset, extent, whole] :
       std::vector<std::array<Shape, 3>>{{{{0, 3}, {9, 4}, {9, 7}}},
                                         {{{1, 2, 0}, {2, 3, 5}, {4, 6, 5}}},
                                         {{{1, 0, 2, 0}, {2, 2, 3, 5}, {4, 2, 6, 5}}},
                                         {{{1, 0, 2, 1}, {1, 2, 1, 3}, {4, 2, 6, 5}}},
                                         {{{3}, {4}, {9}}},
                                         {{{}, {}, {}}}}) {
    const FlatIndex index(offset, extent, whole);
    for (std::int64_t at = 0; at < extent.elements(); ++at) {
      std::int64_t rest = at, expected = 0, pitch = 1;
      for (int d = whole.rank - 1; d >= 0; --d) {
        expected += (offset[d] + rest % extent[d]) * pitch;
        rest /= extent[d];
        pitch *= whole[d];
      }
      ASSERT_EQ(index.at(at), expected) << whole.str() << " " << at;
    }
  }
}

AdamWStep step_number(std::int64_t step) {
  return {.lr = 3e-3f, .weight_decay = 0.1f, .step = step, .grad_scale = 0.5f};
}

struct State {
  HostTensor m_n, v_n, m_scale, v_scale;
  std::int64_t first;
  State(std::int64_t n, std::int64_t at)
      : m_n(filled({n}, DType::kU8, 0)),
        v_n(filled({n}, DType::kU8, 0)),
        m_scale(filled({moment_blocks(at, n)}, DType::kF32, 0)),
        v_scale(filled({moment_blocks(at, n)}, DType::kF32, 0)),
        first(at) {}
  CodedMoments coded() { return {m_n, v_n, m_scale, v_scale, first}; }
};

// Where a shard of rows of 300, 304 or 512 lies in rows of 1000 or 1024. Of the second kind, eight neighbours lie
// together: the blocks that are whole are moved in wide loads on a GPU. Of the third, whole blocks do.
enum class Shard { kRagged, kInEights, kInBlocks, kFlat };
struct Case {
  DType weight, grad;
  std::int64_t n, first;
  Shard shard = Shard::kRagged;
  std::int64_t place(std::int64_t at) const {
    if (shard == Shard::kFlat) return at;
    if (shard == Shard::kInBlocks) return at / 512 * 1024 + 8 + at % 512;
    return shard == Shard::kRagged ? at / 300 * 1000 + 5 + at % 300 : at / 304 * 1000 + 8 + at % 304;
  }
  FlatIndex index() const {
    if (shard == Shard::kFlat) return FlatIndex({0}, {100'000}, {100'000});
    if (shard == Shard::kInBlocks) return FlatIndex({0, 8}, {100, 512}, {100, 1024});
    return shard == Shard::kRagged ? FlatIndex({0, 5}, {100, 300}, {100, 1000})
                                   : FlatIndex({0, 8}, {100, 304}, {100, 1000});
  }
};

class AdamW8bit : public testing::TestWithParam<Case> {
 protected:
  OpExec ex;
};

// What the CPU does, spelled out once more in plain steps, to the bit: on every device.
TEST_P(AdamW8bit, EveryDeviceHasTheseBits) {
  const Case& c = GetParam();
  State s(c.n, c.first);
  HostTensor weight = random_tensor({c.n}, c.weight, 1);
  std::vector<double> plain = weight.values();
  std::vector<float> m(plain.size()), v(plain.size());                  // as decoded,
  std::vector<float> m_code = m, v_code = v, m_scale = m, v_scale = v;  // of parts of the block's largest
  const Chance chance{99, c.index()};
  EXPECT_EQ(c.index().in_runs_of(8), c.shard != Shard::kRagged);
  EXPECT_EQ(c.index().in_runs_of(256), c.shard == Shard::kInBlocks || c.shard == Shard::kFlat);
  for (std::int64_t step = 1; step <= 4; ++step) {
    const HostTensor grad = random_tensor({c.n}, c.grad, static_cast<unsigned>(10 + step));
    ops::adamw8bit(ex, weight, s.coded(), grad, step_number(step), chance);
    const AdamWStep h = step_number(step);
    const double b1 = h.beta1, b2 = h.beta2;
    const auto keep = static_cast<float>(1.0 - static_cast<double>(h.lr) * h.weight_decay);
    const auto size = static_cast<float>(h.lr / (1.0 - std::pow(b1, static_cast<double>(step))));
    const auto bias = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(b2, static_cast<double>(step))));
    std::vector<std::uint32_t> bits;
    for (std::size_t i = 0; i < plain.size(); ++i) {
      const std::int64_t place = c.place(c.first + static_cast<std::int64_t>(i));
      const std::uint32_t word =
          philox<kRoundingRounds>(99, static_cast<std::uint64_t>(place / 8),
                                  static_cast<std::uint64_t>(step))[static_cast<std::size_t>(place % 8 / 2)];
      bits.push_back(place % 2 == 0 ? word : word << 16 | word >> 16);
      const float g = static_cast<float>(grad.get(i)) * h.grad_scale;
      m[i] = std::fma(static_cast<float>(1 - b1), g, m_code[i] * (m_scale[i] * h.beta1));
      v[i] = std::fma(static_cast<float>(1 - b2) * g, g, v_code[i] * (v_scale[i] * h.beta2));
      const float w = std::fma(-size, m[i] * newton_reciprocal(std::fma(newton_root(v[i]), bias, h.eps)),
                               static_cast<float>(plain[i]) * keep);
      plain[i] = static_cast<double>(
          c.weight == DType::kF32 ? w : to_float(round_by_chance(w, bits.back() & 0xffffu)));
    }
    for (std::size_t i = 0; i < plain.size();) {  // a block
      const std::int64_t block = (c.first + static_cast<std::int64_t>(i)) / 256;
      const auto end =
          std::min<std::size_t>(plain.size(), static_cast<std::size_t>((block + 1) * 256 - c.first));
      float most_m = 0, most_v = 0;
      for (std::size_t j = i; j < end; ++j) {
        most_m = std::max(most_m, std::abs(m[j]));
        most_v = std::max(most_v, v[j]);
      }
      for (; i < end; ++i) {
        m_code[i] = decode_first(encode_first(m[i] * newton_reciprocal(most_m), bits[i] >> 16 & 255));
        v_code[i] = decode_second(encode_second(v[i] * newton_reciprocal(most_v), bits[i] >> 24));
        m[i] = m_code[i] * (m_scale[i] = most_m);
        v[i] = v_code[i] * (v_scale[i] = most_v);
      }
    }
    ASSERT_EQ(weight.values(), plain) << "step " << step;
  }
  HostTensor got_m({c.n}, DType::kF32), got_v({c.n}, DType::kF32);
  ops::decode_moments(ex, got_m, got_v, s.coded());
  EXPECT_EQ(got_m.values(), std::vector<double>(m.begin(), m.end()));
  EXPECT_EQ(got_v.values(), std::vector<double>(v.begin(), v.end()));
}

INSTANTIATE_TEST_SUITE_P(
    Cases, AdamW8bit,
    testing::Values(Case{DType::kBF16, DType::kBF16, 4096, 0}, Case{DType::kBF16, DType::kF32, 10'000, 256},
                    Case{DType::kF32, DType::kF32, 1000, 0}, Case{DType::kF32, DType::kBF16, 777, 1024},
                    Case{DType::kBF16, DType::kBF16, 1000, 3}, Case{DType::kBF16, DType::kF32, 5, 254},
                    Case{DType::kBF16, DType::kBF16, 600, 200}, Case{DType::kBF16, DType::kBF16, 1, 0},
                    Case{DType::kBF16, DType::kBF16, 0, 0},
                    Case{DType::kBF16, DType::kBF16, 4096, 0, Shard::kFlat},
                    Case{DType::kBF16, DType::kF32, 3000, 256, Shard::kInEights},
                    Case{DType::kF32, DType::kBF16, 2047, 200, Shard::kInEights},
                    Case{DType::kBF16, DType::kBF16, 10'000, 512, Shard::kInBlocks},
                    Case{DType::kF32, DType::kBF16, 5000, 40, Shard::kInBlocks},
                    Case{DType::kF32, DType::kF32, 1000, 1024, Shard::kFlat},
                    Case{DType::kBF16, DType::kBF16, 300, 8, Shard::kFlat},
                    Case{DType::kBF16, DType::kBF16, 248, 8, Shard::kFlat},
                    Case{DType::kBF16, DType::kBF16, 2560, 3, Shard::kFlat}));

TEST(AdamW8bitState, DecodedIsEncodedToTheSameBits) {
  OpExec ex;
  State s(3000, 100), again(3000, 100);
  HostTensor weight = random_tensor({3000}, DType::kBF16, 1);
  for (std::int64_t step = 1; step <= 3; ++step)
    ops::adamw8bit(ex, weight, s.coded(), random_tensor({3000}, DType::kBF16, static_cast<unsigned>(step)),
                   step_number(step), {5, FlatIndex({0}, {4000}, {4000})});
  HostTensor m({3000}, DType::kF32), v({3000}, DType::kF32);
  ops::decode_moments(ex, m, v, s.coded());
  ops::encode_moments(ex, again.coded(), m, v);
  EXPECT_TRUE(again.m_n == s.m_n);
  EXPECT_TRUE(again.v_n == s.v_n);
  EXPECT_TRUE(again.m_scale == s.m_scale);
  EXPECT_TRUE(again.v_scale == s.v_scale);
}

// A slice of a shard that begins at a block has the whole shard's bits: cutting it moves nothing.
TEST(AdamW8bitState, AShardMayBeCutAtBlocks) {
  OpExec ex;
  State whole(1024, 0), tail(512, 512);
  HostTensor all = random_tensor({1024}, DType::kBF16, 1), part({512}, DType::kBF16);
  for (std::size_t i = 0; i < 512; ++i) part.set(i, all.get(512 + i));
  const Chance chance{7, FlatIndex({0}, {1024}, {1024})};
  for (std::int64_t step = 1; step <= 3; ++step) {
    const HostTensor grad = random_tensor({1024}, DType::kF32, static_cast<unsigned>(20 + step));
    HostTensor part_grad({512}, DType::kF32);
    for (std::size_t i = 0; i < 512; ++i) part_grad.set(i, grad.get(512 + i));
    ops::adamw8bit(ex, all, whole.coded(), grad, step_number(step), chance);
    ops::adamw8bit(ex, part, tail.coded(), part_grad, step_number(step), chance);
  }
  for (std::size_t i = 0; i < 512; ++i) ASSERT_EQ(part.get(i), all.get(512 + i)) << i;
}

// A quadratic bowl, its sides of very different steepness.
constexpr std::int64_t kBowl = 2048, kBowlSteps = 400;
double steepness(std::size_t i) {
  return std::pow(10.0, -static_cast<double>(i % 5));
}
AdamWStep bowl_step(std::int64_t step) {
  return {.lr = 1e-2f * static_cast<float>(kBowlSteps + 1 - step) / kBowlSteps, .step = step};
}
double slope(std::size_t i, double x, std::int64_t step) {
  const float noise = uniform_from_bits(philox(4, i, static_cast<std::uint64_t>(step))[0]) - 0.5f;
  return steepness(i) * (x + 0.05 * static_cast<double>(noise));
}
template <class At>
double height(const At& at) {
  double sum = 0;
  for (std::size_t i = 0; i < kBowl; ++i) sum += steepness(i) * at(i) * at(i);
  return sum;
}

double height_after_coded_steps(std::uint64_t key) {
  OpExec ex;
  State s(kBowl, 0);
  HostTensor x = random_tensor({kBowl}, DType::kBF16, 1), grad({kBowl}, DType::kF32);
  for (std::int64_t step = 1; step < kBowlSteps; ++step) {
    for (std::size_t i = 0; i < kBowl; ++i) grad.set(i, slope(i, x.get(i), step));
    ops::adamw8bit(ex, x, s.coded(), grad, bowl_step(step), {key, FlatIndex({0}, {kBowl}, {kBowl})});
  }
  return height([&](std::size_t i) { return x.get(i); });
}

// It comes as near to the bottom as AdamW in fp32 does: on average over chances, any of which may be 13 % off.
TEST(AdamW8bitState, DescendsAsAdamWDoes) {
  std::vector<double> x = random_tensor({kBowl}, DType::kBF16, 1).values(), m(x.size()), v(x.size());
  const double start = height([&](std::size_t i) { return x[i]; });
  for (std::int64_t step = 1; step < kBowlSteps; ++step)
    for (std::size_t i = 0; i < kBowl; ++i)
      reference_adamw(x[i], m[i], v[i], slope(i, x[i], step), bowl_step(step));
  const double plain = height([&](std::size_t i) { return x[i]; });
  constexpr std::uint64_t kKeys = 8;
  double coded = 0;
  for (std::uint64_t key = 1; key <= kKeys; ++key) coded += height_after_coded_steps(key) / kKeys;
  EXPECT_LT(plain, start / 50);
  EXPECT_NEAR(coded, plain, plain / 20);
}

TEST(AdamW8bitArguments, AreChecked) {
  OpExec ex;
  State s(600, 0);
  HostTensor weight = random_tensor({600}, DType::kBF16, 1), grad = random_tensor({600}, DType::kF32, 2),
             longer = random_tensor({601}, DType::kF32, 3);
  const Chance chance;
  EXPECT_NO_THROW(ops::adamw8bit(ex, weight, s.coded(), grad, step_number(1), chance));
  EXPECT_THROW(ops::adamw8bit(ex, weight, s.coded(), longer, step_number(1), chance), Error);
  EXPECT_THROW(ops::adamw8bit(ex, weight, s.coded(), grad, step_number(0), chance), Error);
  CodedMoments shifted = s.coded();
  shifted.first = 255;  // one block more
  EXPECT_THROW(ops::adamw8bit(ex, weight, shifted, grad, step_number(1), chance), Error);
  shifted.first = -1;
  EXPECT_THROW(ops::adamw8bit(ex, weight, shifted, grad, step_number(1), chance), Error);
  EXPECT_THROW(ops::encode_moments(ex, s.coded(), grad, weight), Error);
  EXPECT_THROW(ops::decode_moments(ex, grad, longer, s.coded()), Error);
}

}  // namespace
}  // namespace upmoe::test
