#pragma once
// The keys and values that generation keeps: of every block of a model, and of the heads that this rank has.

#include <vector>

#include "kernels/ops/attention_decode.h"

namespace upmoe {

class KeyCaches {
 public:
  // In `keep`, which outlives them, and uninitialised: no op reads a slot that nobody has stored to. `blocks`: their
  // attention, of this rank's heads. `slots` of each row, as attention_decode.h says.
  KeyCaches(Arena& keep, const std::vector<AttentionShape>& blocks, std::int64_t rows, std::int64_t slots,
            DType dtype);
  // What the memory of such a cache takes.
  static std::int64_t bytes_of(const std::vector<AttentionShape>& blocks, std::int64_t rows,
                               std::int64_t slots, DType dtype);
  const KeyCache& of(std::size_t block) const { return caches_[block]; }
  std::size_t bytes() const { return bytes_; }
  std::int64_t rows() const { return caches_.empty() ? 0 : caches_.front().k_BSK.shape[0]; }

 private:
  std::size_t bytes_ = 0;
  std::vector<KeyCache> caches_;
};

}  // namespace upmoe
