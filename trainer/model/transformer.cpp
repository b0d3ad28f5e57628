#include "trainer/model/transformer.h"

#include <algorithm>

#include "kernels/ops/embedding.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

namespace {

// One fp64 on the device that ops add to.
TensorView loss_sum(Exec& ex, Arena& arena) {
  TensorView sum_1 = arena.take({1}, DType::kF64, "loss sum");
  const double zero = 0;
  ops::upload(ex, sum_1, host_view(&zero, {1}));
  return sum_1;
}

double value_of(Exec& ex, TensorView sum_1) {
  double value = 0;
  ops::download(ex, host_view(&value, {1}), sum_1);
  return value;
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

// The mixtures' loads lie together: one sum over the ranks that share the micro-batch, one pool. What was lost is added
// to; the rest is written by the routers.
void Transformer::prepare_loads(Exec& ex, const MicroBatch& batch, Arena& keep, Saved& saved) const {
  RouterLoad load;
  if (batch.sequence_T.given() && batch.sequences > 0) {
    const std::int64_t t = own_tokens(batch), first = tp->rank() * t;
    load.sequences = batch.sequences;
    load.sequence_t = batch.sequence_T.rows(first, first + t);
  }
  std::int64_t mixtures = 0;
  LoadRow& row = saved.row;
  row = {0, load.sequences, static_cast<bool>(batch.routed), batch.weights, batch.chances};
  for (const Block& b : blocks)
    if (const auto* moe = std::get_if<MoeLayer>(&b.ffn)) {
      ++mixtures;
      row.experts = moe->num_experts;
    }
  const std::int64_t E = row.experts;
  saved.loads_ML = keep.take({mixtures, mixtures > 0 ? row.size() : 0}, DType::kF64, "router loads");
  if (row.lost && mixtures > 0) {
    const std::vector<double> zeros(static_cast<std::size_t>(saved.loads_ML.elements()));
    ops::upload(ex, saved.loads_ML, host_view(zeros.data(), saved.loads_ML.shape));
  }
  std::int64_t m = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i)
    if (blocks[i].is_moe()) {
      const TensorView row_L = saved.loads_ML.rows(m, m + 1).reshape({row.size()});
      load.sums_L = row_L.rows(0, RouterLoad::size(E, row.sequences));
      if (row.lost) load.lost_1 = row_L.rows(row.lost_at(), row.lost_at() + 1);
      if (row.weights) load.weight_E = row_L.rows(row.weights_at(), row.weights_at() + E);
      if (row.chances) load.chance_E = row_L.rows(row.chances_at(), row.chances_at() + E);
      saved.blocks[i].balance.load = load;
      saved.blocks[i].balance.tokens = routed_tokens(batch, i);
      saved.blocks[i].balance.groups = {batch.groups, tp};
      ++m;
    }
}

// Of the step before: [M, E], one row for each mixture here; absent where no term asks.
TensorView Transformer::previous_loads(Exec& ex, const BalanceConfig& config, std::int64_t experts) const {
  if (config.previous.empty()) return {};
  const auto M = std::count_if(blocks.begin(), blocks.end(), [](const Block& b) { return b.is_moe(); });
  const TensorView previous_ME = ex.scratch->take({M, experts}, DType::kF32, "loads of the step before");
  std::int64_t m = 0;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    if (!blocks[i].is_moe()) continue;
    ops::cast(ex, previous_ME.rows(m, m + 1).reshape({experts}),
              config.previous[static_cast<std::size_t>(first_block) + i]);
    ++m;
  }
  return previous_ME;
}

// A term that pools the tokens of all mixtures has a gradient only when every chunk's forward is over; the routers'
// backward is the first to need it.
void Transformer::set_balance(Exec& ex, const BalanceConfig& config, const Loads& all, Arena& keep,
                              Saved& saved) const {
  if (all.mixtures == 0) return;
  std::vector<RouterBalance*> mixtures;
  for (Block::Saved& b : saved.blocks)
    if (b.balance.load) mixtures.push_back(&b.balance);
  const auto M = static_cast<std::int64_t>(mixtures.size());
  LoadRow row = saved.row;
  row.experts = all.pool_2E.elements() / 2;  // known where this chunk has no mixture, too
  const std::int64_t E = row.experts, B = row.sequences, rows = std::max<std::int64_t>(1, B);
  BalanceGradients gradients{keep.take({M * rows, E}, DType::kF32, "balance gradients")};
  if (row.weights) gradients.weight_ME = keep.take({M, E}, DType::kF32, "importance gradients");
  if (row.chances) gradients.chance_ME = keep.take({M, E}, DType::kF32, "load gradients");
  const auto& [aux_ME, weight_ME, chance_ME] = gradients;
  if (saved.tokens == 0) {  // a rank without a micro-batch in this round: no tokens, no term
    for (const TensorView& gradient : {aux_ME, weight_ME, chance_ME})
      if (gradient.given()) ops::fill(ex, gradient, 0.0f);
  } else {
    ScratchScope scope(*ex.scratch);
    const BalanceCounts counts{saved.loads_ML, all.pool_2E, previous_loads(ex, config, E)};
    ops::balance_gradients(ex, gradients, all.values_V, counts,
                           rule_of(config, {saved.tokens, all.mixtures, row}, output.has_value()));
  }
  for (std::int64_t m = 0; m < M; ++m) {
    RouterBalance& b = *mixtures[static_cast<std::size_t>(m)];
    const TensorView aux_BE = aux_ME.rows(m * rows, (m + 1) * rows);
    b.terms.aux = B > 0 ? aux_BE : aux_BE.reshape({E});
    b.terms.row_T = b.load.sequence_t;
    if (row.weights) b.weight_gradient_E = weight_ME.rows(m, m + 1).reshape({E});
    if (row.chances) b.chance_gradient_E = chance_ME.rows(m, m + 1).reshape({E});
    b.terms.z_scale = z_scale_of(config, saved.tokens);
  }
}

void Transformer::forward(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD, double loss_scale,
                          Arena& keep, Saved& saved, const std::function<void(int)>& before_block) const {
  const auto before = [&](int block) {
    if (before_block) before_block(block);
  };
  const Shape shape{own_tokens(batch), hidden_size};
  saved.blocks.assign(blocks.size(), {});
  prepare_loads(ex, batch, keep, saved);
  saved.tokens_T = batch.tokens_T;
  saved.tokens = shape[0] * pool->size();
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
  if (pool->size() > 1 && saved.loads_ML.rows() > 0) pool->all_reduce(saved.loads_ML, ReduceOp::kSum, ex);
  if (!output) {
    saved.output_tD = summed(ex, x);
    return;
  }
  before(-1);
  saved.dnormed_tD = keep.take(shape, dtype, "final norm gradient");
  output->norm.forward(ex, branch_tD, x, keep, saved.final_norm);  // which is done with the branch
  saved.output_tD = saved.final_norm.x_TD;
  saved.loss_1 = loss_sum(ex, keep);
  if (batch.soft) saved.divergence_1 = loss_sum(ex, keep);
  output->head.forward(ex, {saved.loss_1, saved.divergence_1}, branch_tD, {batch.targets_T, batch.soft},
                       saved.dnormed_tD, static_cast<float>(loss_scale));
}

void Transformer::backward(Exec& ex, TensorView g_tD, Arena& keep, Saved& saved,
                           const std::function<void(int)>& block_done) const {
  if (output) output->norm.backward(ex, g_tD, Accumulate::kOverwrite, saved.dnormed_tD, saved.final_norm);
  for (std::size_t i = blocks.size(); i-- > 0;) {
    if (i >= first_trained) blocks[i].backward(ex, g_tD, keep, saved.blocks[i]);
    if (block_done) block_done(first_block + static_cast<int>(i));
  }
  if (!embedding || !embedding->weight_VD.wants_grad()) return;
  ScratchScope scope(*ex.scratch);
  if (embedding->scale != 1) ops::scale(ex, g_tD, embedding->scale);
  ops::embedding_backward(ex, embedding->weight_VD.write_grad(), gather_tokens(ex, *tp, g_tD), saved.tokens_T,
                          embedding->shard);
}

void Transformer::Sees::operator()(int number, const Block::Saved& saved) const {
  if (inputs) inputs(number, saved.normed2_TD);
  if (const auto* mixture = std::get_if<MoeLayer::Saved>(&saved.ffn); routing && mixture != nullptr)
    routing(number, mixture->choices);
}

// Whether some tokens of the last block are read by nobody: keys and values are all that later ones see of them.
bool Transformer::picks_fewer(const Continuation& rows) const {
  const std::int64_t N = rows.pick_N.elements();
  return N % tp->size() == 0 && N < rows.tokens.row_T.rows();
}

// Nothing is kept for a backward: a block's own memory goes when it is done.
Transformer::Turns Transformer::run_blocks(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD,
                                           Arena& keep, const Continuation* rows, const Sees& see) const {
  const Shape shape{own_tokens(batch), hidden_size};
  Turns turns{keep.take(shape, dtype, "block input"), keep.take(shape, dtype, "block output"), input_tD};
  auto& [x_tD, y_tD, input] = turns;
  if (embedding) {
    embed(ex, x_tD, batch);
    input = x_tD;
  }
  TokenPlaces places = batch.places;
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const std::size_t mark = keep.mark();
    ScratchScope scope(*ex.scratch);
    const TensorView branch_tD = ex.scratch->take(shape, dtype, "residual branch");
    const TensorView normed_tD = shares_norms() ? keep.take(shape, dtype, "norm output") : TensorView{};
    Block::Saved saved;
    saved.balance.groups = {batch.groups, tp};
    if (rows != nullptr) places.cached = CachedPlaces{rows->caches.of(i), rows->tokens, rows->begins};
    std::int64_t made = shape[0];
    if (rows != nullptr && i + 1 == blocks.size() && picks_fewer(*rows)) {
      places.cached->pick_N = rows->pick_N;
      made = rows->pick_N.elements() / tp->size();
    }
    input = summed(ex, blocks[i].forward(ex, {y_tD.rows(0, made), branch_tD.rows(0, made), normed_tD},
                                         {input}, places, keep, saved));
    see(first_block + static_cast<int>(i), saved);
    keep.rewind(mark);
    std::swap(x_tD, y_tD);
  }
  return turns;
}

void Transformer::ffn_inputs(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD, Arena& keep,
                             const SeeInputs& see) const {
  run_blocks(ex, batch, input_tD, keep, nullptr, {.inputs = see});
}

Transformer::Evaluated Transformer::evaluate(Exec& ex, const MicroBatch& batch, ConstTensorView input_tD,
                                             Arena& keep, const LmHead::Sink& sink,
                                             const SeeRouting& routing) const {
  const Turns last = run_blocks(ex, batch, input_tD, keep, nullptr, {.routing = routing});
  if (!output) return {last.output_tD, 0};
  Norm::Saved saved;
  output->norm.forward(ex, last.y_tD, {last.output_tD}, keep, saved);
  ScratchScope scope(*ex.scratch);
  TensorView loss_1 = loss_sum(ex, *ex.scratch);
  output->head.forward(ex, {loss_1}, last.y_tD, {batch.targets_T}, {}, 0.0f, sink);
  return {{}, value_of(ex, loss_1)};
}

ConstTensorView Transformer::head_input(Exec& ex, const MicroBatch& batch, Arena& keep) const {
  UPMOE_CHECK(embedding && output, "what the head of a part of a model reads");
  const TensorView normed_tD = keep.take({own_tokens(batch), hidden_size}, dtype, "head input");
  const std::size_t mark = keep.mark();
  const Turns last = run_blocks(ex, batch, {}, keep, nullptr, {});
  Norm::Saved saved;
  output->norm.forward(ex, normed_tD, {last.output_tD}, keep, saved);
  keep.rewind(mark);
  return normed_tD;
}

TensorView Transformer::logits(Exec& ex, const MicroBatch& batch, const Continuation& rows,
                               Arena& keep) const {
  UPMOE_CHECK(embedding && output, "logits of a part of a model");
  const Turns last = run_blocks(ex, batch, {}, keep, &rows, {});
  if (rows.pick_N.elements() == 0) return {};  // on every rank of tp
  Norm::Saved saved;
  const TensorView normed_tD = last.y_tD.rows(0, last.output_tD.rows());
  output->norm.forward(ex, normed_tD, {last.output_tD}, keep, saved);
  return output->head.logits(ex, normed_tD, picks_fewer(rows) ? ConstTensorView{} : rows.pick_N, keep);
}

std::vector<AttentionShape> Transformer::attention_of_blocks() const {
  std::vector<AttentionShape> all;
  for (const Block& block : blocks) all.push_back(block.attention.shape);
  return all;
}

}  // namespace upmoe
