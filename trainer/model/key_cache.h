#pragma once
// The keys and values that generation keeps: of every block of a model, and of the heads that this rank has.

#include <vector>

#include "kernels/ops/attention_decode.h"

namespace upmoe {

class KeyCaches {
 public:
  // `blocks`: their attention, of this rank's heads. `slots` of each row, as attention_decode.h says.
  KeyCaches(const std::vector<AttentionShape>& blocks, std::int64_t rows, std::int64_t slots, DType dtype,
            Device device);
  const KeyCache& of(std::size_t block) const { return caches_[block]; }
  std::size_t bytes() const { return memory_.bytes(); }

 private:
  Buffer memory_;
  std::vector<KeyCache> caches_;
};

}  // namespace upmoe
