#include "trainer/model/transformer.h"

#include <algorithm>

#include "kernels/ops/embedding.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

namespace {

// One fp64 on the device that ops add to.
TensorView loss_sum(Exec& ex) {
  TensorView sum_1 = ex.scratch->take({1}, DType::kF64, "loss sum");
  const double zero = 0;
  ops::upload(ex, sum_1, host_view(&zero, {1}));
  return sum_1;
}

double value_of(Exec& ex, TensorView sum_1) {
  double value = 0;
  ops::download(ex, host_view(&value, {1}), sum_1);
  return value;
}

// One behind the other; zeros where nothing was counted.
void upload_rows(Exec& ex, TensorView out, const std::vector<std::vector<float>>& rows) {
  std::vector<float> all;
  for (const auto& row : rows) all.insert(all.end(), row.begin(), row.end());
  all.resize(static_cast<std::size_t>(out.elements()));
  ops::upload(ex, out, host_view(static_cast<const float*>(all.data()), out.shape));
}

}  // namespace

void Transformer::embed(Exec& ex, TensorView x_tD, const MicroBatch& batch) const {
  ScratchScope scope(*ex.scratch);
  PartialSum x(ex, *tp, x_tD);
  ops::embedding_forward(ex, x.partial_TD(), batch.tokens_T, embedding->weight_VD.value, embedding->shard);
  x.reduce(ex);
  if (embedding->scale != 1) ops::scale(ex, x_tD, embedding->scale);
}

// Those of this rank, as the router of a block sees them.
RoutedTokens Transformer::routed_tokens(const MicroBatch& batch, std::size_t block) const {
  RoutedTokens routed = batch.routed;
  if (!routed) return routed;
  const std::int64_t t = own_tokens(batch), first = tp->rank() * t;
  routed.place_T = routed.place_T.rows(first, first + t);
  routed.layer = static_cast<std::uint32_t>(first_block) + static_cast<std::uint32_t>(block);
  routed.pool = pool;
  return routed;
}

// The mixtures' loads lie together, so that the host waits for the device once. A row is the sums of every router;
// then, where it is wanted, what was lost, which is added to, and the sums of weights and of chances.
TensorView Transformer::prepare_loads(Exec& ex, const MicroBatch& batch, Arena& keep, Saved& saved) const {
  std::int64_t mixtures = 0, experts = 0;
  RouterLoad load;
  if (batch.sequence_T.given() && batch.sequences > 0) {
    const std::int64_t t = own_tokens(batch), first = tp->rank() * t;
    load.sequences = batch.sequences;
    load.sequence_t = batch.sequence_T.rows(first, first + t);
  }
  for (const Block& b : blocks)
    if (const auto* moe = std::get_if<MoeLayer>(&b.ffn)) {
      ++mixtures;
      experts = moe->num_experts;
    }
  const std::int64_t width = mixtures > 0 ? RouterLoad::size(experts, load.sequences) : 0;
  const std::int64_t more =
      (batch.routed ? 1 : 0) + (batch.weights ? experts : 0) + (batch.chances ? experts : 0);
  TensorView loads_ML = keep.take({mixtures, width + more}, DType::kF64, "router loads");
  if (batch.routed) {
    const std::vector<double> zeros(static_cast<std::size_t>(loads_ML.elements()));
    ops::upload(ex, loads_ML, host_view(zeros.data(), loads_ML.shape));
  }
  std::int64_t m = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i)
    if (blocks[i].is_moe()) {
      const TensorView row = loads_ML.rows(m, m + 1).reshape({width + more});
      std::int64_t at = 0;
      const auto take = [&](std::int64_t n) {
        at += n;
        return row.rows(at - n, at);
      };
      load.sums_L = take(width);
      if (batch.routed) load.lost_1 = take(1);
      if (batch.weights) load.weight_E = take(experts);
      if (batch.chances) load.chance_E = take(experts);
      saved.blocks[i].balance.load = load;
      saved.blocks[i].balance.tokens = routed_tokens(batch, i);
      saved.blocks[i].balance.groups = {batch.groups, tp};
      ++m;
    }
  return loads_ML;
}

// One sum over the ranks that share the micro-batch for all mixtures together.
void Transformer::collect_loads(Exec& ex, std::int64_t tokens, ConstTensorView loads_ML, Saved& saved) const {
  std::vector<double> packed(static_cast<std::size_t>(loads_ML.elements()));
  ops::download(ex, host_view(packed.data(), loads_ML.shape), loads_ML);
  if (pool->size() > 1)
    pool->all_reduce(host_view(packed.data(), {static_cast<std::int64_t>(packed.size())}), ReduceOp::kSum,
                     ex);
  std::span<const double> rest(packed);
  for (const Block::Saved& b : saved.blocks) {
    if (!b.balance.load) continue;
    const RouterLoad& load = b.balance.load;
    std::span<const double> row = rest.first(static_cast<std::size_t>(loads_ML.shape[1]));
    rest = rest.subspan(row.size());
    const auto take = [&](ConstTensorView counted) {
      const auto values = row.first(counted.given() ? static_cast<std::size_t>(counted.elements()) : 0);
      row = row.subspan(values.size());
      return std::vector<double>(values.begin(), values.end());
    };
    LayerLoad layer = LayerLoad::unpack(tokens * pool->size(), load.sequences, take(load.sums_L));
    for (const double lost : take(load.lost_1)) layer.lost = lost;
    layer.weight = take(load.weight_E);
    layer.chance = take(load.chance_E);
    saved.loads.push_back(std::move(layer));
  }
}

void Transformer::give_previous(const BalanceConfig& config, Saved& saved) const {
  if (config.previous.empty()) return;
  std::size_t m = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i)
    if (blocks[i].is_moe())
      saved.loads[m++].previous = config.previous[static_cast<std::size_t>(first_block) + i];
}

// A term that pools the tokens of all mixtures has a gradient only when every chunk's forward is over; the routers'
// backward is the first to need it.
void Transformer::set_balance(Exec& ex, const BalanceConfig& config, const LoadPool& all, Arena& keep,
                              Saved& saved) const {
  std::vector<RouterBalance*> mixtures;
  for (Block::Saved& b : saved.blocks)
    if (b.balance.load) mixtures.push_back(&b.balance);
  const bool dry = ex.device.type == DeviceType::kDry;  // nothing was counted; backward still wants tensors
  give_previous(config, saved);
  if (!dry) saved.balance = balance_terms(config, saved.loads, all, output.has_value());
  if (mixtures.empty()) return;
  const auto M = static_cast<std::int64_t>(mixtures.size());
  const RouterLoad& load = mixtures.front()->load;
  const std::int64_t E = load.experts(), B = load.sequences, rows = std::max<std::int64_t>(1, B);
  TensorView aux_ME = keep.take({M * rows, E}, DType::kF32, "balance gradients");
  upload_rows(ex, aux_ME, saved.balance.aux_gradient);
  TensorView weight_ME, chance_ME;
  if (load.weight_E.given()) {
    weight_ME = keep.take({M, E}, DType::kF32, "importance gradients");
    upload_rows(ex, weight_ME, saved.balance.weight_gradient);
  }
  if (load.chance_E.given()) {
    chance_ME = keep.take({M, E}, DType::kF32, "load gradients");
    upload_rows(ex, chance_ME, saved.balance.chance_gradient);
  }
  for (std::int64_t m = 0; m < M; ++m) {
    RouterBalance& b = *mixtures[static_cast<std::size_t>(m)];
    const TensorView aux_BE = aux_ME.rows(m * rows, (m + 1) * rows);
    b.terms.aux = B > 0 ? aux_BE : aux_BE.reshape({E});
    b.terms.row_T = b.load.sequence_t;
    if (weight_ME.given()) b.weight_gradient_E = weight_ME.rows(m, m + 1).reshape({E});
    if (chance_ME.given()) b.chance_gradient_E = chance_ME.rows(m, m + 1).reshape({E});
    if (!dry) b.terms.z_scale = saved.balance.z_scale[static_cast<std::size_t>(m)];
  }
}

void Transformer::forward(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD, double loss_scale,
                          Arena& keep, Saved& saved, const std::function<void(int)>& before_block) const {
  const auto before = [&](int block) {
    if (before_block) before_block(block);
  };
  const Shape shape{own_tokens(batch), hidden_size};
  saved.blocks.assign(blocks.size(), {});
  const TensorView loads_ML = prepare_loads(ex, batch, keep, saved);
  saved.tokens_T = batch.tokens_T;
  ConstTensorView x_tD = input_tD;
  if (embedding) {
    before(-1);
    TensorView embedded_tD = keep.take(shape, dtype, "embedding");
    embed(ex, embedded_tD, batch);
    x_tD = embedded_tD;
  }
  ScratchScope scope(*ex.scratch);
  // What a block leaves to be added: its reader, the next norm, is done with it before it is written again.
  const TensorView branch_tD = ex.scratch->take(shape, dtype, "residual branch");
  const TensorView normed_tD = shares_norms() ? keep.take(shape, dtype, "norm output") : TensorView{};
  Residual x{x_tD};
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    before(first_block + static_cast<int>(i));
    TensorView y_tD = keep.take(shape, dtype, "block output");
    x = blocks[i].forward(ex, {y_tD, branch_tD, normed_tD}, x, batch.places, keep, saved.blocks[i]);
  }
  collect_loads(ex, shape[0], loads_ML, saved);
  if (!output) {
    saved.output_tD = summed(ex, x);
    return;
  }
  before(-1);
  saved.dnormed_tD = keep.take(shape, dtype, "final norm gradient");
  output->norm.forward(ex, branch_tD, x, keep, saved.final_norm);  // which is done with the branch
  saved.output_tD = saved.final_norm.x_TD;
  TensorView loss_1 = loss_sum(ex);
  output->head.forward(ex, loss_1, branch_tD, batch.targets_T, saved.dnormed_tD,
                       static_cast<float>(loss_scale));
  saved.loss = value_of(ex, loss_1);
}

void Transformer::backward(Exec& ex, TensorView g_tD, Arena& keep, Saved& saved,
                           const std::function<void(int)>& block_done) const {
  if (output) output->norm.backward(ex, g_tD, Accumulate::kOverwrite, saved.dnormed_tD, saved.final_norm);
  for (std::size_t i = blocks.size(); i-- > 0;) {
    blocks[i].backward(ex, g_tD, keep, saved.blocks[i]);
    if (block_done) block_done(first_block + static_cast<int>(i));
  }
  if (!embedding || !embedding->weight_VD.wants_grad()) return;
  ScratchScope scope(*ex.scratch);
  if (embedding->scale != 1) ops::scale(ex, g_tD, embedding->scale);
  ops::embedding_backward(ex, embedding->weight_VD.write_grad(), gather_tokens(ex, *tp, g_tD), saved.tokens_T,
                          embedding->shard);
}

Transformer::Evaluated Transformer::evaluate(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD,
                                             Arena& keep, const LmHead::Sink& sink) const {
  const Shape shape{own_tokens(batch), hidden_size};
  TensorView x_tD = keep.take(shape, dtype, "block input"), y_tD = keep.take(shape, dtype, "block output");
  ConstTensorView input = input_tD;
  if (embedding) {
    embed(ex, x_tD, batch);
    input = x_tD;
  }
  for (const Block& block : blocks) {
    // Nothing is kept for a backward: two buffers take turns, a block's own memory goes when it is done.
    const std::size_t mark = keep.mark();
    ScratchScope scope(*ex.scratch);
    const TensorView branch_tD = ex.scratch->take(shape, dtype, "residual branch");
    const TensorView normed_tD = shares_norms() ? keep.take(shape, dtype, "norm output") : TensorView{};
    Block::Saved saved;
    saved.balance.groups = {batch.groups, tp};
    input = summed(ex, block.forward(ex, {y_tD, branch_tD, normed_tD}, {input}, batch.places, keep, saved));
    keep.rewind(mark);
    std::swap(x_tD, y_tD);
  }
  if (!output) return {input, 0};
  Norm::Saved saved;
  output->norm.forward(ex, y_tD, {input}, keep, saved);
  ScratchScope scope(*ex.scratch);
  TensorView loss_1 = loss_sum(ex);
  output->head.forward(ex, loss_1, y_tD, batch.targets_T, {}, 0.0f, sink);
  return {{}, value_of(ex, loss_1)};
}

}  // namespace upmoe
