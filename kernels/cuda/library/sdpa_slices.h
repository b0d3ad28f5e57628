#pragma once
// cuDNN's deterministic backward of attention in parts, because of its temporary memory.

#include <algorithm>
#include <vector>

#include "kernels/ops/attention.h"

namespace upmoe::cuda {

// Some sequences whole, or some heads of one sequence (key heads with their query heads).
struct SdpaSlice {
  std::int64_t first_sequence = 0, sequences = 0, first_kv_head = 0, kv_heads = 0;
};

// On Hopper it holds seq_len^2 elements of bf16 for each head that it computes at once: one slice after the other, so
// that these are no more than `most` bytes; or of one key head's query heads, if those alone are more, because their
// sums belong together.
inline std::vector<SdpaSlice> backward_slices(const AttentionShape& shape, std::int64_t tokens,
                                              std::int64_t most) {
  const std::int64_t sequences = tokens / shape.seq_len, group = shape.heads / shape.kv_heads,
                     of_group = group * shape.seq_len * shape.seq_len * 2;
  const std::int64_t groups = std::max<std::int64_t>(most / of_group, 1);
  std::vector<SdpaSlice> slices;
  if (groups >= shape.kv_heads) {
    const std::int64_t each = groups / shape.kv_heads;
    for (std::int64_t at = 0; at < sequences; at += each)
      slices.push_back({at, std::min(each, sequences - at), 0, shape.kv_heads});
    return slices;
  }
  for (std::int64_t at = 0; at < sequences; ++at)
    for (std::int64_t head = 0; head < shape.kv_heads; head += groups)
      slices.push_back({at, 1, head, std::min(groups, shape.kv_heads - head)});
  return slices;
}

}  // namespace upmoe::cuda
