// One layer of the model, forward and backward, as the trainer runs it.

#include <tuple>

#include "kernels/ops/transfer.h"
#include "parallel/self_comm.h"
#include "parallel/stage_plan.h"
#include "tests/bench/gpu_bench.h"
#include "trainer/model/make_transformer.h"
#include "trainer/session.h"

namespace upmoe::bench {

namespace {

ModelConfig one_layer() {
  const ModelShape& m = shape();
  ModelConfig c;
  c.model_type = "qwen2_moe";
  c.intermediate_size = m.shared_width;
  c.head_dim = m.head_dim;
  c.max_position_embeddings = m.seq_len;
  c.hidden_size = m.width;
  c.num_hidden_layers = 1;
  c.num_attention_heads = c.num_key_value_heads = static_cast<int>(m.heads);
  c.vocab_size = 256;  // the ends of the model are not run
  c.num_experts = static_cast<int>(m.experts);
  c.num_experts_per_tok = static_cast<int>(m.top_k);
  c.moe_intermediate_size = m.expert_width;
  c.shared_expert_intermediate_size = m.shared_width;
  return c;
}

class Layer {
 public:
  explicit Layer(std::int64_t tokens)
      : config_(one_layer()),
        mesh_(MeshSpec{}, *world_),
        plan_(one_stage(1)),
        params_(config_, MeshSpec{}, plan_, 0,
                {.dtype = DType::kBF16, .grad_dtype = DType::kBF16, .device = exec().device, .freeze = {}}),
        model_(make_transformer(config_, params_, mesh_, plan_, 0, Recompute::kNone)),
        keep_(exec().device, std::size_t{1} << 40, "activations"),
        x_({tokens, config_.hidden_size}, DType::kBF16),
        y_({tokens, config_.hidden_size}, DType::kBF16),
        g_({tokens, config_.hidden_size}, DType::kBF16),
        aux_({config_.num_experts}, DType::kF32),
        load_({RouterLoad::size(config_.num_experts)}, DType::kF64),
        positions_({tokens}, DType::kI32, 1) {
    params_.initialise(exec(), 1);
    std::vector<std::int32_t> positions(static_cast<std::size_t>(tokens));
    const std::int64_t seq = std::min(shape().seq_len, tokens);
    for (std::size_t i = 0; i < positions.size(); ++i)
      positions[i] = static_cast<std::int32_t>(static_cast<std::int64_t>(i) % seq);
    ops::upload(exec(), positions_.view,
                host_view(static_cast<const std::int32_t*>(positions.data()), {tokens}));
    places_ = {positions_.view, {}, seq};
  }
  void forward(Exec& ex, Block::Saved& saved) {
    ScratchScope scope(*ex.scratch);
    const TensorView branch = ex.scratch->take(x_.view.shape, x_.view.dtype, "residual branch");
    summed(ex, model_.blocks[0].forward(ex, {y_.view, branch}, {x_.view}, places_, keep_, saved));
  }
  void run(Exec& ex, bool backward) {
    ScratchScope scope(keep_);
    Block::Saved saved;
    saved.balance.load.sums_L = load_.view;
    saved.balance.terms.aux = aux_.view;
    forward(ex, saved);
    if (backward) model_.blocks[0].backward(ex, g_.view, keep_, saved);
  }

 private:
  ModelConfig config_;
  std::unique_ptr<Communicator> world_ = make_self_communicator();
  ProcessMesh mesh_;
  StagePlan plan_;
  ParamStore params_;
  Transformer model_;
  Arena keep_;
  Tensor x_, y_, g_, aux_, load_, positions_;
  TokenPlaces places_;
};

}  // namespace

void add_layer(std::int64_t tokens) {
  for (const auto& [how, backward, experts] : {std::tuple("forward", false, ExpertsPath::kStreams),
                                               {"forward_backward", true, ExpertsPath::kStreams},
                                               {"forward_backward_fused", true, ExpertsPath::kFused}})
    add(fmt::format("layer_{}/{}", how, tokens), [=, backward = backward, experts = experts] {
      const auto layer = std::make_shared<Layer>(tokens);
      return [=](Exec& ex) {
        Exec by_path = ex;
        by_path.experts = experts;
        layer->run(by_path, backward);
      };
    });
}

}  // namespace upmoe::bench
