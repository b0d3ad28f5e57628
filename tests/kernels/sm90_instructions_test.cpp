// Each wrapper of an instruction on the model of the hardware. The same cases run on a GPU by tests/bench/sm90.

#include <gtest/gtest.h>

#include "tests/kernels/sm90_instructions_cases.h"

namespace upmoe::cuda::sm90 {
namespace {

struct Model {
  template <class T>
  class Buffer {
   public:
    explicit Buffer(std::size_t n) : values_(n) {}
    explicit Buffer(const std::vector<T>& from) : values_(from) {}
    T* data() const { return values_.data(); }
    std::vector<T> host() const { return values_; }

   private:
    mutable std::vector<T> values_;
  };
  template <class... Parameters, class... Arguments>
  static void run(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, std::size_t shared_bytes,
                  unsigned cluster, const Arguments&... arguments) {
    for (const auto when : {sm90_twin::When::kEarliest, sm90_twin::When::kLatest, sm90_twin::When::kAnytime})
      sm90_twin::run({blocks, threads, shared_bytes, cluster, when, 5}, [&] { kernel(arguments...); });
  }
};

TEST(Sm90Instructions, DoWhatTheirUsersExpect) {
  InstructionCases<Model>::each(
      [](const char* name, const std::string& wrong) { EXPECT_EQ(wrong, "") << name; });
}

}  // namespace
}  // namespace upmoe::cuda::sm90
