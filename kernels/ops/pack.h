#pragma once
// Many tensors through one piece of memory, in one call: what is sent to the owners of slices, and what comes of them.

#include <span>
#include <vector>

#include "kernels/core/exec.h"

namespace upmoe {

// How tensors lie in packed memory. Each is cut, flat, into the same number of parts as balanced.h says; parts of one
// number stand together in one row, in the order of the tensors. Two tensors, a and b, in three parts:
//
//   packed_PS   | a/0 b/0 .. |     P = 3 rows, and S at least slice(): what a row has behind its parts nobody reads
//               | a/1 b/1 .. |     or writes
//               | a/2 b/2 .. |
//
// Made once, of the tensors' sizes; it refers to no memory.
class PackedParts {
 public:
  static constexpr std::size_t kMostTensors = 64;
  struct Part {  // of one tensor
    std::int64_t begin = 0, size = 0;
  };

  PackedParts() = default;
  PackedParts(std::vector<std::int64_t> elements, std::int64_t parts);  // of each tensor; parts > 0
  const std::vector<std::int64_t>& elements() const { return elements_; }
  std::int64_t parts() const { return parts_; }
  std::int64_t slice() const { return slice_; }  // elements of the largest row
  Part part(std::size_t tensor, std::int64_t row) const;
  std::int64_t row_elements(std::int64_t row) const;

 private:
  std::vector<std::int64_t> elements_;
  std::int64_t parts_ = 1, slice_ = 0;
};
inline constexpr std::int64_t kNoRow = -1;

}  // namespace upmoe

namespace upmoe::ops {

// Tensors are as many and as long as `packing` says, fp32 or bf16, all of one dtype; where that of packed_PS is the
// other one, values are converted. No two of them overlap.

// packed_PS = the tensors' parts.
void pack_parts(Exec& ex, TensorView packed_PS, std::span<const ConstTensorView> tensors,
                const PackedParts& packing);
// The tensors' parts (+)= those in packed_PS, but for those of row `except`, which stay as they are (kNoRow: none do).
// Sums are in fp32.
void unpack_parts(Exec& ex, std::span<const TensorView> tensors, ConstTensorView packed_PS,
                  const PackedParts& packing, std::int64_t except, Accumulate mode);

}  // namespace upmoe::ops
