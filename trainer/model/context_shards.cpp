#include "trainer/model/context_shards.h"

namespace upmoe {

std::vector<std::int32_t> ContextShards::take(const std::int32_t* values, std::int64_t sequences) const {
  std::vector<std::int32_t> mine;
  mine.reserve(static_cast<std::size_t>(sequences * seq_len / ranks));
  // Half by half, so that a half of all sequences is one block of rows, which is what the ring works on.
  for (int half = 0; half < halves(); ++half)
    for (std::int64_t s = 0; s < sequences; ++s) {
      const std::int32_t* begin = values + s * seq_len + chunk_of(rank, half) * chunk_len();
      mine.insert(mine.end(), begin, begin + chunk_len());
    }
  return mine;
}

}  // namespace upmoe
