#pragma once
// Offsets of experts' rows for the op tests, on the host and on the test device.

#include "kernels/ops/expert_rows.h"
#include "tests/support/random_tensor.h"

namespace upmoe::test {

class Offsets {
 public:
  Offsets(std::initializer_list<std::int64_t> offsets) : Offsets(std::vector(offsets)) {}
  explicit Offsets(const std::vector<std::int64_t>& offsets)
      : on_host_(offsets),
        on_device_(tensor_of({static_cast<std::int64_t>(offsets.size())}, DType::kI32,
                             std::vector<double>(offsets.begin(), offsets.end()))) {}
  // NOLINTNEXTLINE(google-explicit-constructor): as it is
  operator ExpertRows() const { return {on_device_, on_host_}; }
  ExpertRows on_device() const { return {on_device_, {}}; }  // alone
  std::int64_t operator[](std::size_t i) const { return on_host_[i]; }
  std::int64_t back() const { return on_host_.back(); }

 private:
  std::vector<std::int64_t> on_host_;
  HostTensor on_device_;
};

inline Offsets offsets_of(const std::vector<std::int64_t>& counts) {
  std::vector<std::int64_t> offsets{0};
  for (std::int64_t n : counts) offsets.push_back(offsets.back() + n);
  return Offsets(offsets);
}

}  // namespace upmoe::test
