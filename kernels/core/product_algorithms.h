#pragma once
// Which of the algorithms that a GPU's library offers computes a dense product. The library orders them by what it
// believes; a table of those that a tool timed (tests/bench/time_algorithms.cpp) knows better, for some shapes on some
// devices. Nothing is timed while training: luck would choose the bits.

#include <compare>
#include <map>
#include <string>

#include "kernels/core/tensor.h"

namespace upmoe {

// c [M, N] (+)= op(a) op(b) [+ bias], as ops::gemm has it.
struct ProductShape {
  std::int64_t m = 0, n = 0, k = 0;
  bool transpose_a = false, transpose_b = false;
  DType in = DType::kF32, out = DType::kF32;
  bool adds = false, bias = false;
  std::int64_t alignment = 256;  // bytes that divide every address, at most 256
  auto operator<=>(const ProductShape&) const = default;
};

// What a choice holds for: another version of the library offers other algorithms, in another order.
struct ProductLibrary {
  std::string device;  // "NVIDIA H200"
  int version = 0;     // of cuBLASLt: 130100
  auto operator<=>(const ProductLibrary&) const = default;
};

// The place of the chosen one among those offered, from 0.
using AlgorithmOfShape = std::map<ProductShape, int>;
struct ProductAlgorithms {
  std::map<ProductLibrary, AlgorithmOfShape> tables;
};
constexpr int kOfferedAlgorithms = 8;  // at most, that a table speaks of

// 0, the library's first, for what the table does not have.
int choose(const ProductAlgorithms& algorithms, const ProductLibrary& library, const ProductShape& shape);

std::string words_of(const ProductShape& shape);

}  // namespace upmoe
