#pragma once
// An Exec for tests of single ops, with scratch and a ledger; and how many threads an op may use.

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "tests/support/test_device.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace upmoe::test {

class OpExec {
 public:
  explicit OpExec(DeviceType type = test_device())
      : device_{type, 0}, scratch_(device_, std::size_t{1} << 30, "scratch"), exec_(test_exec()) {
    exec_.device = device_;
    exec_.scratch = &scratch_;
    exec_.ledger = &ledger_;
  }
  operator Exec&() { return exec_; }  // NOLINT(google-explicit-constructor): passed to ops as it is
  const Ledger& ledger() const { return ledger_; }
  std::size_t scratch_used() const { return scratch_.used(); }
  // What scratch gives is what was there. On the CPU it is now, for the first `floats` of it, what spoils every sum.
  void spoil_scratch(std::int64_t floats = 1 << 22) {
    if (device_.type != DeviceType::kCpu) return;
    ScratchScope scope(scratch_);
    const TensorView all = scratch_.take({floats}, DType::kF32, "spoiled");
    std::fill_n(all.as<float>(), floats, std::numeric_limits<float>::quiet_NaN());
  }
  std::size_t scratch_peak() const { return scratch_.peak(); }

 private:
  Device device_;
  Arena scratch_;
  Ledger ledger_;
  Exec exec_;
};

// Runs `op` with one, two and three threads (on a GPU, three times); the results of `op` (a HostTensor or a
// tuple of them) must be the same bits. Without OpenMP this is a test of repeatability.
template <class Op>
void expect_same_for_any_threads(const Op& op) {
#ifdef _OPENMP
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const auto one = op();
  for (int threads : {2, 3}) {
    omp_set_num_threads(threads);
    EXPECT_TRUE(op() == one) << threads << " threads";
  }
  omp_set_num_threads(before);
#else
  const auto one = op();
  EXPECT_TRUE(op() == one);
#endif
}

// Flops, bytes read and written that the ledger holds for one call of `op`.
inline void expect_booked(const Ledger& ledger, const std::string& op, double flops, double read,
                          double written) {
  const auto it = ledger.entries().find(op);
  ASSERT_NE(it, ledger.entries().end()) << op;
  EXPECT_EQ(it->second.calls, 1) << op;
  EXPECT_DOUBLE_EQ(it->second.flops, flops) << op;
  EXPECT_DOUBLE_EQ(it->second.bytes_read, read) << op;
  EXPECT_DOUBLE_EQ(it->second.bytes_written, written) << op;
}

}  // namespace upmoe::test
