#pragma once
// A rehearsal of the model's parts on the dry device: nothing is computed, everything is booked.

#include <algorithm>
#include <memory>

#include "parallel/stage_plan.h"
#include "trainer/session.h"

namespace upmoe {

// The whole model on one dry rank with one micro-batch of `sequences`: what its parts would book and take.
class DryModel {
 public:
  struct Options {
    std::int64_t sequences = 1;
    DType dtype = DType::kF32;
    Recompute recompute = Recompute::kNone;
  };
  DryModel(const RunConfig& run, const ModelConfig& config, const Options& options)
      : config_(config),
        options_(options),
        seq_len_(run.data.seq_len),
        tokens_(options.sequences * seq_len_),
        memory_(Device{DeviceType::kDry, 0}),
        mesh_(MeshSpec{}, *world_),
        plan_(one_stage(config.num_hidden_layers)),
        params_(config, MeshSpec{}, plan_, 0,
                {.dtype = options.dtype,
                 .grad_dtype = options.dtype,
                 .fp32 = fp32_roles(run.router.dtype),
                 .device = Device{DeviceType::kDry, 0},
                 .freeze = {}}),
        model_(make_transformer(config, params_, mesh_, plan_, 0, options.recompute)),
        keep_(Device{DeviceType::kDry, 0}, 0, "activations of the rehearsal") {}

  // FLOPs of block i, and of the head, forward and backward.
  double block(std::size_t i) {
    return cost([&] {
      Block::Saved saved;
      const std::size_t before = keep_.used();
      const std::int64_t experts = std::max(1, config_.num_experts);
      if (model_.blocks[i].is_moe())
        saved.balance.load = {keep_.take({RouterLoad::size(experts)}, DType::kF64, "router load")};
      model_.blocks[i].forward(memory_.exec, stream(), stream(), places(), keep_, saved);
      kept_bytes = stream().bytes() + keep_.used() - before;
      saved.balance.aux_E = dry({experts}, DType::kF32);
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

  std::size_t kept_bytes = 0;  // of the last block(): what it keeps from forward to backward, its input too
  std::size_t scratch_bytes() const { return memory_.scratch.peak(); }  // of everything so far

 private:
  TensorView dry(Shape shape, DType dtype) const {
    return {nullptr, shape, dtype, Device{DeviceType::kDry, 0}};
  }
  TensorView stream() const { return dry({tokens_, config_.hidden_size}, options_.dtype); }
  TokenPlaces places() const { return {dry({tokens_}, DType::kI32), {}, seq_len_}; }
  template <class Work>
  double cost(const Work& work) {
    memory_.ledger.clear();
    work();
    return memory_.ledger.total().flops;
  }

  const ModelConfig& config_;
  Options options_;
  std::int64_t seq_len_, tokens_;
  RankMemory memory_;
  std::unique_ptr<Communicator> world_ = make_dry_communicator(0, 1);
  ProcessMesh mesh_;
  StagePlan plan_;
  ParamStore params_;
  Transformer model_;
  Arena keep_;
};

}  // namespace upmoe
