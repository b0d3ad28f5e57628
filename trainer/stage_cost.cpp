// What the parts of a model cost, from the ledger: each kind of block, the embedding and the head run once,
// forward and backward, on the dry device.

#include "trainer/session.h"

namespace upmoe {

namespace {

// The model alone on one dry rank, and the FLOPs that its parts book for one sequence.
class DryModel {
 public:
  DryModel(const RunConfig& run, const ModelConfig& config)
      : config_(config),
        tokens_(run.data.seq_len),
        memory_(Device{DeviceType::kDry, 0}),
        mesh_(MeshSpec{}, *world_),
        plan_(one_stage(config.num_hidden_layers)),
        params_(config, MeshSpec{}, plan_, 0, {.device = Device{DeviceType::kDry, 0}, .freeze = {}}),
        model_(make_transformer(config, params_, mesh_, plan_, 0, Recompute::kNone)),
        keep_(Device{DeviceType::kDry, 0}, 0, "activations of the rehearsal") {}

  double block(std::size_t i) {
    return cost([&] {
      Block::Saved saved;
      model_.blocks[i].forward(memory_.exec, stream(), stream(), places(), keep_, saved);
      saved.aux_E = dry({std::max(1, config_.num_experts)}, DType::kF32);
      model_.blocks[i].backward(memory_.exec, stream(), keep_, saved);
    });
  }
  double head() {
    return cost([&] {
      const TensorView gradient = stream();
      model_.output->head.forward(memory_.exec, dry({1}, DType::kF64), stream(), dry({tokens_}, DType::kI32),
                                  &gradient, 1.0f);
    });
  }

 private:
  TensorView dry(Shape shape, DType dtype) const {
    return {nullptr, shape, dtype, Device{DeviceType::kDry, 0}};
  }
  TensorView stream() const { return dry({tokens_, config_.hidden_size}, DType::kF32); }
  TokenPlaces places() const { return {dry({tokens_}, DType::kI32), {}, tokens_}; }
  template <class Work>
  double cost(const Work& work) {
    memory_.ledger.clear();
    work();
    return memory_.ledger.total().flops;
  }

  const ModelConfig& config_;
  std::int64_t tokens_;
  RankMemory memory_;
  std::unique_ptr<Communicator> world_ = make_dry_communicator(0, 1);
  ProcessMesh mesh_;
  StagePlan plan_;
  ParamStore params_;
  Transformer model_;
  Arena keep_;
};

}  // namespace

StagePlan stages_of(const RunConfig& run, const ModelConfig& model) {
  const int stages = run.parallel.pp, chunks = run.parallel.pp_chunks;
  if (stages * chunks == 1) return one_stage(model.num_hidden_layers);
  std::vector<double> costs(static_cast<std::size_t>(model.num_hidden_layers));
  DryModel dry(run, model);
  double dense = -1, mixture = -1;  // blocks of a kind are alike
  for (int i = 0; i < model.num_hidden_layers; ++i) {
    double& kind = model.is_moe_layer(i) ? mixture : dense;
    if (kind < 0) kind = dry.block(static_cast<std::size_t>(i));
    costs[static_cast<std::size_t>(i)] = kind;
  }
  return plan_stages(stages, chunks, costs, 0, dry.head());  // the embedding is a copy: no product
}

}  // namespace upmoe
