#pragma once
// The factors of products on packed blocks (packed_gemm.h), and how much room the second of them, b, takes packed: in
// panels of columns. How they are packed belongs to what multiplies: packed_vectors.h or packed_matrices.h.

#include <algorithm>

#include "kernels/core/tensor.h"
#include "kernels/cpu/units.h"

namespace upmoe::cpu {

// a(m, k) or b(k, n) with "outer" index m or n: data[outer * stride + k], or data[k * stride + outer] if depth_major.
template <class T>
struct Operand {
  const T* data;
  std::int64_t stride;
  bool depth_major;
};

// c[m, n] (+)= sum over k < depth of a(m, k) b(k, n) [+ bias[n]]; rows of c lie one behind the other. Or, turned,
// c[n, m] and bias[m]: the same sums to the bit with the factors' places changed, for few tokens times a weight. What
// is packed as panels takes longer to pack than rows do, so it should be what there is less of.
template <class T, class Out>
struct PackedProduct {
  Out* c;
  Operand<T> a, b;
  std::int64_t rows, columns, depth;
  Accumulate mode;
  const T* bias = nullptr;
  bool turned = false;

  PackedProduct as_turned() const { return {c, b, a, columns, rows, depth, mode, bias, !turned}; }
};

constexpr std::int64_t kPanelColumns = 4 * kLanes;  // columns of a packed panel of b

struct Range {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

template <class T>
inline const T* element(const Operand<T>& x, std::int64_t outer, std::int64_t k) {
  return x.data + (x.depth_major ? k * x.stride + outer : outer * x.stride + k);
}

constexpr std::int64_t parts_of_size(std::int64_t n, std::int64_t size) {
  return (n + size - 1) / size;
}

// Units of a panel's depth: as many as Form multiplies at once, and so on.
template <class Form>
constexpr std::int64_t panel_units(std::int64_t depth) {
  return parts_of_size(units_of<typename Form::Unit>(depth), Form::kUnitsAtOnce) * Form::kUnitsAtOnce;
}

template <class Form>
constexpr std::int64_t packed_columns_size(std::int64_t depth, std::int64_t columns) {
  return panel_units<Form>(depth) * parts_of_size(columns, kLanes) * kLanes;
}

// Columns of b whose packed form takes at most `bytes`, in whole panels; at least one.
template <class Form>
constexpr std::int64_t columns_of_bytes(std::int64_t bytes, std::int64_t depth) {
  const std::int64_t panel_bytes = std::max<std::int64_t>(1, panel_units<Form>(depth)) * kPanelColumns * 4;
  return std::max<std::int64_t>(1, bytes / panel_bytes) * kPanelColumns;
}

// Rows of memory of a depth-major operand, of which a part that is narrower than a page is packed at a time. Few enough
// that their pages stay known, and the rest of their cache lines at hand, for the next part.
constexpr std::int64_t kDepthBlock = 64;

// Units of these columns, in whole vectors, zero past the last column.
template <class T>
inline void pack_columns(UnitOf<T>* out, UnitStrides strides, const Operand<T>& b, Range columns,
                         Range depth) {
  const std::int64_t width = parts_of_size(columns.size(), kLanes) * kLanes;
  const T* in = element(b, columns.begin, depth.begin);
  if (b.depth_major)
    pack_depth_major(out, strides, width, in, b.stride, columns.size(), depth.size());
  else
    pack_transposed(out, strides, width, in, b.stride, columns.size(), depth.size());
}

// Rows of memory are packed rows already where units are what lies there.
template <class T>
inline bool lie_as_units(const Operand<T>& x, std::int64_t depth) {
  constexpr std::int64_t kPer = kPerUnit<UnitOf<T>>;
  return kPer * sizeof(T) == sizeof(UnitOf<T>) && !x.depth_major && x.stride % kPer == 0 && depth % kPer == 0;
}

}  // namespace upmoe::cpu
