#pragma once
// Which tokens of a sequence a context-parallel rank computes. A sequence of S tokens is cut into 2P chunks
// of equal length; rank r of P holds chunks r and 2P-1-r, so that causal attention costs every rank the same
// ("zig-zag"). A rank's tokens stand half by half: chunk r of every sequence, then chunk 2P-1-r of every one.

#include <cstdint>
#include <vector>

namespace upmoe {

struct ContextShards {
  int rank = 0, ranks = 1;
  std::int64_t seq_len = 0;  // S, a multiple of 2 * ranks where there are several

  std::int64_t halves() const { return ranks == 1 ? 1 : 2; }
  std::int64_t chunk_len() const { return ranks == 1 ? seq_len : seq_len / (2 * ranks); }
  // Chunk number (of the sequence) of half h of rank r.
  int chunk_of(int r, int half) const { return half == 0 ? r : 2 * ranks - 1 - r; }
  // This rank's part of one value per token, `sequences` whole sequences one behind the other.
  std::vector<std::int32_t> take(const std::int32_t* values, std::int64_t sequences) const;
};

}  // namespace upmoe
