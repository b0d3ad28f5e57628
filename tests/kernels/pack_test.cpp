#include "kernels/ops/pack.h"

#include <gtest/gtest.h>

#include <array>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"

namespace upmoe::test {
namespace {

constexpr std::array kFloats = {DType::kF32, DType::kBF16};

struct Case {
  std::vector<std::int64_t> sizes;
  std::int64_t parts = 1, behind = 0;  // of a row of the packed memory, behind its parts
  std::int64_t shift = 0;              // elements from the memory's beginning to a tensor's
};

// Nothing at all, fewer elements than parts, one part, packs that both sides reach together and that they do not, and
// rows of several blocks of a device.
std::vector<Case> cases() {
  return {{{0}, 3},
          {{1, 2, 0, 3}, 5, 2},
          {{1000, 17, 64}, 1, 0, 1},
          {{64, 128, 4096}, 8},
          {{4096, 33, 8192}, 7, 3, 3},
          {{70001, 64, 20000}, 2, 1},
          {{5, 30000}, 3, 0, 4},
          {std::vector<std::int64_t>(PackedParts::kMostTensors, 19), 4, 1, 2}};
}

PackedParts packing_of(const Case& c) {
  return PackedParts(c.sizes, c.parts);
}

// Each in memory of its own.
struct Tensors {
  Tensors(const Case& c, DType dtype, unsigned seed) : shift(c.shift) {
    for (const std::int64_t n : c.sizes) memory.push_back(random_tensor({n + shift}, dtype, seed++));
  }
  std::vector<TensorView> written() {
    std::vector<TensorView> views;
    for (HostTensor& t : memory) views.push_back(t.view().rows(shift, t.view().rows()));
    return views;
  }
  std::vector<ConstTensorView> read() const {
    std::vector<ConstTensorView> views;
    for (const HostTensor& t : memory) {
      const ConstTensorView all = t;
      views.push_back(all.rows(shift, all.rows()));
    }
    return views;
  }
  std::size_t at(std::int64_t i) const { return static_cast<std::size_t>(shift + i); }
  friend bool operator==(const Tensors& a, const Tensors& b) { return a.memory == b.memory; }

  std::int64_t shift;
  std::vector<HostTensor> memory;
};

HostTensor packed_for(const Case& c, DType dtype) {
  return random_tensor({c.parts, packing_of(c).slice() + c.behind}, dtype, 99);
}

// body(tensor, its element, the element of the packed memory, the row), from the definition.
template <class Body>
void for_elements(const Case& c, std::int64_t row_length, const Body& body) {
  for (std::int64_t row = 0; row < c.parts; ++row) {
    std::int64_t place = row * row_length;
    for (std::size_t t = 0; t < c.sizes.size(); ++t)
      for (std::int64_t i = c.sizes[t] * row / c.parts; i < c.sizes[t] * (row + 1) / c.parts; ++i)
        body(t, i, static_cast<std::size_t>(place++), row);
  }
}

std::string words(const Case& c, DType dtype, DType packed) {
  return fmt::format("{} tensors of {} and more elements in {} parts, {} and {}", c.sizes.size(),
                     c.sizes.front(), c.parts, name_of(dtype), name_of(packed));
}

TEST(Pack, PutsPartsOfOneNumberTogether) {
  OpExec ex;
  for (const Case& c : cases())
    for (const DType dtype : kFloats)
      for (const DType packed : kFloats) {
        const Tensors tensors(c, dtype, 1);
        HostTensor out = packed_for(c, packed), expected = out;
        for_elements(c, expected.on_host().shape[1],
                     [&](std::size_t t, std::int64_t i, std::size_t place, std::int64_t) {
                       expected.set(place, tensors.memory[t].get(tensors.at(i)));
                     });
        ops::pack_parts(ex, out, tensors.read(), packing_of(c));
        EXPECT_TRUE(out == expected) << words(c, dtype, packed);
      }
  EXPECT_EQ(ex.scratch_peak(), 0u);
}

// All of it, or but for one row; over what is there, or added to it. What no part is stays.
TEST(Pack, TakesThemApart) {
  OpExec ex;
  for (const Case& c : cases())
    for (const DType dtype : kFloats)
      for (const DType packed : kFloats)
        for (const Accumulate mode : {Accumulate::kOverwrite, Accumulate::kAdd})
          for (const std::int64_t except : {kNoRow, c.parts - 1}) {
            const HostTensor in = packed_for(c, packed);
            Tensors out(c, dtype, 1), expected = out;
            for_elements(c, in.on_host().shape[1],
                         [&](std::size_t t, std::int64_t i, std::size_t place, std::int64_t row) {
                           if (row == except) return;
                           const double before =
                               mode == Accumulate::kAdd ? expected.memory[t].get(out.at(i)) : 0;
                           expected.memory[t].set(out.at(i), before + in.get(place));
                         });
            ops::unpack_parts(ex, out.written(), in, packing_of(c), except, mode);
            EXPECT_TRUE(out == expected) << words(c, dtype, packed) << " except row " << except;
          }
}

TEST(Pack, OverwritesWhatIsNoNumber) {
  OpExec ex;
  const HostTensor in = random_tensor({3, 7}, DType::kF32, 1);
  HostTensor out = filled({20}, DType::kF32, NAN);
  const std::vector<TensorView> views{out.view()};
  ops::unpack_parts(ex, views, in, PackedParts({20}, 3), kNoRow, Accumulate::kOverwrite);
  for (const double x : out.values()) EXPECT_TRUE(std::isfinite(x));
}

TEST(Pack, IsTheSameForAnyNumberOfThreads) {
  const Case c{{70001, 3, 20000}, 3};
  expect_same_for_any_threads([&] {
    OpExec ex;
    HostTensor out = packed_for(c, DType::kBF16);
    ops::pack_parts(ex, out, Tensors(c, DType::kF32, 1).read(), packing_of(c));
    return out;
  });
}

TEST(Pack, RowsAreAsLongAsTheLargest) {
  const PackedParts packing({7, 2, 0, 5}, 3);
  std::vector<std::int64_t> rows;
  for (std::int64_t row = 0; row < 3; ++row) rows.push_back(packing.row_elements(row));
  EXPECT_EQ(rows, (std::vector<std::int64_t>{3, 5, 6}));
  EXPECT_EQ(packing.slice(), 6);
  EXPECT_EQ(packing.part(0, 1).begin, 2);
  EXPECT_EQ(packing.part(0, 1).size, 2);
  // The product of elements and parts passes 2^63.
  const std::int64_t many = (std::int64_t{1} << 62) + 1;
  EXPECT_EQ(PackedParts({many}, 3).part(0, 2).begin + PackedParts({many}, 3).part(0, 2).size, many);
  EXPECT_EQ(PackedParts({many}, 3).part(0, 1).begin, many / 3);
}

TEST(Pack, RejectsWhatDoesNotFit) {
  OpExec ex;
  HostTensor a({6}, DType::kF32), b({4}, DType::kF32), narrow({4}, DType::kBF16), integers({4}, DType::kI32);
  HostTensor packed({2, 5}, DType::kF32), other_rows({5, 2}, DType::kF32), short_rows({2, 4}, DType::kF32),
      packed_integers({2, 5}, DType::kI32);
  const PackedParts packing({6, 4}, 2);
  const auto pack = [&](HostTensor& out, const HostTensor& first, const HostTensor& second) {
    const std::vector<ConstTensorView> views{first, second};
    ops::pack_parts(ex, out, views, packing);
  };
  EXPECT_NO_THROW(pack(packed, a, b));
  EXPECT_THROW(pack(packed, b, a), Error) << "of other sizes";
  EXPECT_THROW(pack(packed, a, narrow), Error) << "of two dtypes";
  EXPECT_THROW(pack(packed, a, integers), Error);
  EXPECT_THROW(pack(other_rows, a, b), Error);
  EXPECT_THROW(pack(short_rows, a, b), Error);
  EXPECT_THROW(pack(packed_integers, a, b), Error);
  const std::vector<ConstTensorView> one{a};
  EXPECT_THROW(ops::pack_parts(ex, packed, one, packing), Error);
  const std::vector<TensorView> both{a.view(), b.view()};
  for (const std::int64_t except : {-2, 2})
    EXPECT_THROW(ops::unpack_parts(ex, both, packed, packing, except, Accumulate::kAdd), Error);
  EXPECT_THROW(PackedParts({6}, 0), Error);
  EXPECT_THROW(PackedParts({-1}, 1), Error);
  EXPECT_THROW(PackedParts(std::vector<std::int64_t>(PackedParts::kMostTensors + 1, 1), 1), Error);
}

// One call, and the bytes of what moves: as many as a copy of each part.
TEST(Pack, BooksOnTheDryDevice) {
  const PackedParts packing({7, 2}, 3);  // rows of 2, 3 and 4 elements
  const std::vector<ConstTensorView> read{dry_tensor({7}, DType::kF32), dry_tensor({2}, DType::kF32)};
  const std::vector<TensorView> written{dry_tensor({7}, DType::kF32), dry_tensor({2}, DType::kF32)};
  const TensorView packed = dry_tensor({3, 4}, DType::kBF16);
  {
    OpExec dry(DeviceType::kDry);
    ops::pack_parts(dry, packed, read, packing);
    ops::unpack_parts(dry, written, packed, packing, 2, Accumulate::kOverwrite);
    expect_booked(dry.ledger(), "pack_parts", 0, 36, 18);
    expect_booked(dry.ledger(), "unpack_parts", 0, 10, 20);
  }
  OpExec dry(DeviceType::kDry);
  ops::unpack_parts(dry, written, packed, packing, kNoRow, Accumulate::kAdd);
  expect_booked(dry.ledger(), "unpack_parts", 9, 18 + 36, 36);
}

}  // namespace
}  // namespace upmoe::test
