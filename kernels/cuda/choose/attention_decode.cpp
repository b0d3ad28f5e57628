#include "kernels/cuda/choose/attention_decode.h"

#include <fmt/format.h>

namespace upmoe::cuda {

namespace {

// A tile is computed whole, however few of its 64 queries there are, and a tile alone has as many blocks as heads: a
// quarter of one reads a sixteenth of the keys that its tokens would read one by one.
constexpr std::int64_t kTilesFrom = 16;

}  // namespace

DecodeKernel choose(const DecodeDescription& d, const Gpu&) {
  return d.run >= kTilesFrom ? DecodeKernel::kRun : DecodeKernel::kTokens;
}

std::string words_of(const DecodeDescription& d) {
  const AttentionShape& s = d.shape;
  return fmt::format(
      "attention of {} heads ({} of keys) of {} over a cache, {} tokens, {} of them a run, {}{}", s.heads,
      s.kv_heads, s.head_dim, d.tokens, d.run, name_of(d.dtype),
      s.window > 0 ? fmt::format(", a window of {}", s.window) : "");
}

std::string words_of(DecodeKernel c) {
  return c == DecodeKernel::kRun ? "tiles of queries and keys" : "every token by itself";
}

}  // namespace upmoe::cuda
