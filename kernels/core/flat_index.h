#pragma once
// Where the elements of a shard lie in the whole tensor.

#include "kernels/core/tensor.h"

namespace upmoe {

// From the flat position in a box to the flat position in the whole tensor. Dims that lie together are one.
struct FlatIndex {
  int dims = 1;
  std::int64_t extent[4] = {1, 1, 1, 1};  // outermost first; the last `dims` of them
  std::int64_t stride[4] = {1, 1, 1, 1};
  std::int64_t offset = 0;

  FlatIndex() = default;
  // The box at `offset` of `extent` in a tensor of shape `whole`.
  FlatIndex(const Shape& box_offset, const Shape& box_extent, const Shape& whole) {
    std::int64_t pitch = 1;
    dims = 0;
    for (int d = whole.rank - 1; d >= 0; --d) {
      offset += box_offset[d] * pitch;
      // Joins the dim inside it when that one's run is whole: its stride is then what the run covers.
      const bool joins = dims > 0 && stride[4 - dims] * extent[4 - dims] == pitch;
      if (joins) {
        extent[4 - dims] *= box_extent[d];
      } else if (dims == 0 || box_extent[d] != 1) {
        ++dims;
        extent[4 - dims] = box_extent[d];
        stride[4 - dims] = pitch;
      }
      pitch *= whole[d];
    }
    if (dims == 0) dims = 1;  // a scalar
  }

  // `length` neighbours (eight, or a multiple of it) from a position on that it divides lie together, beginning at a
  // multiple of eight.
  bool in_runs_of(std::int64_t length) const {
    bool all = (dims == 1 || extent[3] % length == 0) && offset % 8 == 0;
    for (int i = 4 - dims; i < 3; ++i) all = all && stride[i] % 8 == 0;
    return all;
  }

  constexpr std::int64_t at(std::int64_t position) const {
    std::int64_t result = offset;
    for (int i = 3; i > 4 - dims; --i) {
      result += position % extent[i] * stride[i];
      position /= extent[i];
    }
    return result + position * stride[4 - dims];
  }
};

}  // namespace upmoe
