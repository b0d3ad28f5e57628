#pragma once
// A golden model on one rank, to generate with, and prompts for it.

#include "parallel/self_comm.h"
#include "tests/support/layout_run.h"
#include "tests/support/same_batch.h"
#include "trainer/generation.h"

namespace upmoe::test {

inline std::vector<std::int32_t> drawn_tokens(std::uint64_t seed, std::int64_t n, std::int64_t vocab) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < n; ++i)
    tokens.push_back(static_cast<std::int32_t>(philox(seed, static_cast<std::uint64_t>(i))[0] %
                                               static_cast<std::uint64_t>(vocab)));
  return tokens;
}

struct GoldenSpeaker {
  explicit GoldenSpeaker(const std::string& name, DType dtype = DType::kF32)
      : golden(name),
        on_rank(golden.config(), {}, *self, test_exec().device, {.dtype = dtype, .gradients = false}) {
    on_rank.params.load(on_rank.memory.exec, golden_weights(golden));
  }
  std::int64_t vocab() const { return golden.config().vocab_size; }

  Golden golden;
  std::unique_ptr<Communicator> self = make_self_communicator();
  RankModel on_rank;
};

}  // namespace upmoe::test
