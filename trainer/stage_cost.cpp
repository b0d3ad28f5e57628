#include "trainer/stage_cost.h"

#include <algorithm>

#include "configs/expert_use.h"
#include "parallel/dry_comm.h"
#include "trainer/rank_model.h"

namespace upmoe {

namespace {

constexpr Device kDry{DeviceType::kDry, 0};

TensorView dry(Shape shape, DType dtype) {
  return {nullptr, shape, dtype, kDry};
}

// The whole model on one dry rank, with one sequence, or with as many as routers route together.
class Parts {
 public:
  Parts(const ModelConfig& config, std::int64_t seq_len)
      : seq_len_(seq_len),
        sequences_(least_sequences(config)),
        model_(config, MeshSpec{}, *world_, kDry, {}) {}

  double block(std::size_t i) {
    const Block& block = model_.chunks.front().blocks[i];
    const std::int64_t experts = std::max(1, model_.config.num_experts);
    return flops_of([&](Exec& ex) {
      Arena keep(kDry, 0, "activations of one block");
      Block::Saved saved;
      if (block.is_moe()) {
        saved.balance.load = {dry({RouterLoad::size(experts)}, DType::kF64)};
        saved.balance.groups = {{dry({tokens()}, DType::kI32), sequences_, sequences_},
                                model_.chunks.front().tp};
      }
      const TokenPlaces places{dry({tokens()}, DType::kI32), {}, seq_len_};
      summed(ex, block.forward(ex, {stream(), stream()}, {stream()}, places, keep, saved));
      saved.balance.terms.aux = dry({experts}, DType::kF32);
      block.backward(ex, stream(), keep, saved);
    });
  }
  double head() {
    return flops_of([&](Exec& ex) {
      model_.chunks.front().output->head.forward(ex, {dry({1}, DType::kF64)}, stream(),
                                                 {dry({tokens()}, DType::kI32)}, stream(), 1.0f);
    });
  }

 private:
  std::int64_t tokens() const { return seq_len_ * sequences_; }
  TensorView stream() const {
    return dry({tokens(), model_.config.hidden_size}, model_.params.compute_dtype());
  }
  template <class Work>
  double flops_of(const Work& work) {
    model_.memory.ledger.clear();
    work(model_.memory.exec);
    return model_.memory.ledger.total().flops;
  }

  std::int64_t seq_len_, sequences_;
  std::unique_ptr<Communicator> world_ = make_dry_communicator(0, 1);
  RankModel model_;
};

}  // namespace

StagePlan stages_of(const RunConfig& run, const ModelConfig& model) {
  const int stages = run.parallel.pp, chunks = run.parallel.pp_chunks;
  if (stages * chunks == 1) return one_stage(model.num_hidden_layers);
  std::vector<double> costs(static_cast<std::size_t>(model.num_hidden_layers));
  Parts parts(model, run.data.seq_len);
  double dense = -1, mixture = -1;  // blocks of a kind are alike
  for (int i = 0; i < model.num_hidden_layers; ++i) {
    double& kind = model.is_moe_layer(i) ? mixture : dense;
    if (kind < 0) kind = parts.block(static_cast<std::size_t>(i));
    costs[static_cast<std::size_t>(i)] = kind;
  }
  return plan_stages(stages, chunks, costs, 0, parts.head());  // the embedding is a copy: no product
}

}  // namespace upmoe
