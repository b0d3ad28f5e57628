#pragma once
// A golden model on one rank, to generate with, prompts for it, and what it says without a cache.

#include <numeric>

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
  // `layers_times`, of fp32 alone: what attention and dense FFNs add to the hidden state, so many times. As they are, a
  // model whose head is its embedding says hardly more than the token before.
  explicit GoldenSpeaker(const std::string& name, DType dtype = DType::kF32, float layers_times = 1)
      : golden(name),
        on_rank(golden.config(), {}, *self, test_exec().device, {.dtype = dtype, .gradients = false}) {
    const ReadParam read = golden_weights(golden);
    on_rank.params.load(on_rank.memory.exec, [&](const ParamSpec& spec, const Box& box, TensorView out) {
      read(spec, box, out);
      if (layers_times == 1 || (spec.role != Role::kAttentionOutput && spec.role != Role::kFfnDown)) return;
      for (std::int64_t i = 0; i < out.elements(); ++i) out.as<float>()[i] *= layers_times;
    });
  }
  std::int64_t vocab() const { return golden.config().vocab_size; }

  Golden golden;
  std::unique_ptr<Communicator> self = make_self_communicator();
  RankModel on_rank;
};

// Of a forward pass over the whole sequence: the logits of all its tokens. Without `positions`: as they come.
inline std::vector<float> whole_logits(RankModel& model, const std::vector<std::int32_t>& tokens,
                                       std::vector<std::int32_t> positions = {}) {
  if (positions.empty()) {
    positions.resize(tokens.size());
    std::iota(positions.begin(), positions.end(), 0);
  }
  std::vector<float> logits;
  model.pipeline.evaluate(
      model.memory.exec, batch_of(tokens, tokens, positions, static_cast<std::int64_t>(tokens.size())),
      [&](std::int64_t, ConstTensorView part_CV) {
        logits.insert(logits.end(), part_CV.as<float>(), part_CV.as<float>() + part_CV.elements());
      });
  return logits;
}

}  // namespace upmoe::test
