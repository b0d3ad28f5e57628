#pragma once
// Attention by cuDNN in parts: because of the temporary memory of its deterministic backward, and of documents, which
// have lengths of their own.

#include <algorithm>
#include <bit>
#include <map>
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

// Documents of about the same length, for one plan of cuDNN: a batch of sequences that begin anywhere among the tokens
// and end somewhere before `length`. Some of the batch may be empty.
struct DocumentSlice {
  std::int64_t length = 0, batch = 0, first_kv_head = 0, kv_heads = 0;
  std::vector<std::int32_t> begin, size;  // of the documents, in tokens
};

// The documents by length, in powers of two from 64 to the sequences': few lengths and few sizes of batches, so that
// steps with other documents find their plans. `most` as above; 0: any memory.
inline std::vector<DocumentSlice> document_slices(const AttentionShape& shape, std::int64_t most) {
  std::map<std::int64_t, DocumentSlice> all;
  for (std::size_t i = 0; i + 1 < shape.runs.size(); ++i) {
    const std::int32_t size = shape.runs[i + 1] - shape.runs[i];
    const auto rounded = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint32_t>(size)));
    DocumentSlice& alike = all[std::min(shape.seq_len, std::max<std::int64_t>(rounded, 64))];
    alike.begin.push_back(shape.runs[i]);
    alike.size.push_back(size);
  }
  std::vector<DocumentSlice> slices;
  for (const auto& [length, alike] : all) {
    const std::int64_t of_group = shape.heads / shape.kv_heads * length * length * 2,
                       count = static_cast<std::int64_t>(alike.size.size());
    const std::int64_t groups =
        most == 0 ? shape.kv_heads * count * 2 : std::max<std::int64_t>(most / of_group, 1);
    const auto each = static_cast<std::int64_t>(
        std::bit_floor(static_cast<std::uint64_t>(std::max<std::int64_t>(groups / shape.kv_heads, 1))));
    const std::int64_t heads = std::min(groups, shape.kv_heads);
    for (std::int64_t at = 0; at < count; at += each)
      for (std::int64_t head = 0; head < shape.kv_heads; head += heads) {
        const std::int64_t here = std::min(each, count - at);
        const auto part = [&](const std::vector<std::int32_t>& of) {
          return std::vector<std::int32_t>(of.begin() + at, of.begin() + at + here);
        };
        slices.push_back({length, static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(here))),
                          head, std::min(heads, shape.kv_heads - head), part(alike.begin), part(alike.size)});
      }
  }
  return slices;
}

// The same on the device, int32: where each document's rows begin, in elements of a matrix with qkv's rows and of one
// with out's (one more: where the last ends), its first token and its length; those of the empty ones are behind the
// last and 0.
struct DocumentTable {
  ConstTensorView qkv_offset_b1, out_offset_b1, begin_b, size_b;
};

}  // namespace upmoe::cuda
