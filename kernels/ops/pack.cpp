#include "kernels/ops/pack.h"

#include <algorithm>
#include <utility>

#include "kernels/core/balanced.h"
#include "kernels/ops/check_tensor.h"
#include "kernels/ops/dispatch.h"

namespace upmoe {

PackedParts::PackedParts(std::vector<std::int64_t> elements, std::int64_t parts)
    : elements_(std::move(elements)), parts_(parts) {
  UPMOE_CHECK(parts > 0 && elements_.size() <= kMostTensors, "{} tensors in {} parts", elements_.size(),
              parts);
  for (const std::int64_t n : elements_) UPMOE_CHECK(n >= 0, "a tensor of {} elements", n);
  for (std::int64_t row = 0; row < parts; ++row) slice_ = std::max(slice_, row_elements(row));
}

PackedParts::Part PackedParts::part(std::size_t tensor, std::int64_t row) const {
  const std::int64_t begin = balanced_begin(elements_[tensor], parts_, row);
  return {begin, balanced_begin(elements_[tensor], parts_, row + 1) - begin};
}

std::int64_t PackedParts::row_elements(std::int64_t row) const {
  std::int64_t n = 0;
  for (std::size_t i = 0; i < elements_.size(); ++i) n = checked_add(n, part(i, row).size);
  return n;
}

namespace ops {

namespace {

// Of the packed memory, the tensors and what is known of both; the elements of the tensors.
template <class View>
double check_packed(const Exec& ex, const ConstTensorView& packed_PS, std::span<const View> tensors,
                    const PackedParts& packing,
                    std::source_location where = std::source_location::current()) {
  if (packed_PS.shape.rank != 2 || packed_PS.shape[0] != packing.parts() ||
      packed_PS.shape[1] < packing.slice() || tensors.size() != packing.elements().size())
    fail_check(
        "the packed memory has a row for each part", where,
        fmt::format("packed_PS {}, {} tensors; {} tensors in {} parts of at most {}", packed_PS.shape.str(),
                    tensors.size(), packing.elements().size(), packing.parts(), packing.slice()));
  check_float(packed_PS, "packed_PS", where);
  check_tensor(ex, packed_PS, packed_PS.shape, packed_PS.dtype, "packed_PS", where);
  double elements = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const ConstTensorView t = tensors[i];
    check_float(t, "a tensor", where);
    check_tensor(ex, t, t.shape, tensors[0].dtype, "a tensor", where);
    if (t.elements() != packing.elements()[i])
      fail_check("a tensor as long as it is packed", where,
                 fmt::format("tensor {} is {}, packed {}", i, t.shape.str(), packing.elements()[i]));
    elements += static_cast<double>(t.elements());
  }
  return elements;
}

template <class View>
double element_bytes(std::span<const View> tensors) {
  return tensors.empty() ? 0.0 : static_cast<double>(size_of(tensors[0].dtype));
}

}  // namespace

void pack_parts(Exec& ex, TensorView packed_PS, std::span<const ConstTensorView> tensors,
                const PackedParts& packing) {
  const double elements = check_packed(ex, packed_PS, tensors, packing);
  ex.book("pack_parts", 0, elements * element_bytes(tensors),
          elements * static_cast<double>(size_of(packed_PS.dtype)));
  dispatch(ex, &Backend::pack_parts, packed_PS, tensors, packing);
}

void unpack_parts(Exec& ex, std::span<const TensorView> tensors, ConstTensorView packed_PS,
                  const PackedParts& packing, std::int64_t except, Accumulate mode) {
  UPMOE_CHECK(kNoRow <= except && except < packing.parts(), "row {} of {}", except, packing.parts());
  double elements = check_packed(ex, packed_PS, tensors, packing);
  if (except != kNoRow) elements -= static_cast<double>(packing.row_elements(except));
  const double packed = elements * static_cast<double>(size_of(packed_PS.dtype)),
               own = elements * element_bytes(tensors);
  const bool adds = mode == Accumulate::kAdd;
  ex.book("unpack_parts", adds ? elements : 0.0, adds ? packed + own : packed, own);
  dispatch(ex, &Backend::unpack_parts, tensors, packed_PS, packing, except, mode);
}

}  // namespace ops

}  // namespace upmoe
