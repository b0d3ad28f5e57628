#include "trainer/pipeline.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <span>

#include "kernels/ops/balance.h"
#include "kernels/ops/transfer.h"
#include "parallel/watchdog.h"
#include "trainer/placed_vectors.h"

namespace upmoe {

struct Pipeline::Shard {
  // The last five are made where somebody asks for them: masked documents, routers.
  std::vector<std::int32_t> tokens, targets, positions, documents, sequences, places, rows, grouped;
  std::vector<std::int32_t> runs;  // where documents begin in whole sequences, and T
  PlacedVectors placed;            // the same but the runs
  MicroBatch batch;

  // This rank's part of every sequence.
  void cut(const ContextShards& context, const Batch& whole) {
    const auto part = [&](const ConstTensorView& values_T) {
      return context.take(values_T.as<std::int32_t>(), whole.sequences());
    };
    tokens = part(whole.tokens_T);
    targets = part(whole.targets_T);
    positions = part(whole.positions_T);
    runs.clear();
    if (!whole.document_T.given()) return;
    documents = part(whole.document_T);
    if (context.ranks == 1) find_runs(whole.seq_len);
  }
  void find_runs(std::int64_t seq_len) {
    const auto length = static_cast<std::size_t>(seq_len);
    for (std::size_t t = 0; t < documents.size(); ++t)
      if (t % length == 0 || documents[t] != documents[t - 1]) runs.push_back(static_cast<std::int32_t>(t));
    if (!runs.empty()) runs.push_back(static_cast<std::int32_t>(documents.size()));
  }
  // Which sequence each of them is of, for routers that count by sequence.
  void number(const ContextShards& context, std::int64_t count) {
    std::vector<std::int32_t> whole(static_cast<std::size_t>(count * context.seq_len));
    for (std::size_t t = 0; t < whole.size(); ++t)
      whole[t] = static_cast<std::int32_t>(t / static_cast<std::size_t>(context.seq_len));
    sequences = context.take(whole.data(), count);
  }
  // Where each of them stands in the micro-batch; and of every place the row of its token among those of all ranks.
  void find_places(const ContextShards& context, std::int64_t count) {
    std::vector<std::int32_t> whole(static_cast<std::size_t>(count * context.seq_len));
    std::iota(whole.begin(), whole.end(), 0);
    rows.resize(whole.size());
    std::int32_t row = 0;
    for (int rank = 0; rank < context.ranks; ++rank) {
      ContextShards of_rank = context;
      of_rank.rank = rank;
      const std::vector<std::int32_t> there = of_rank.take(whole.data(), count);
      for (const std::int32_t place : there) rows[static_cast<std::size_t>(place)] = row++;
      if (rank == context.rank) places = there;
    }
  }
  // The rows of this rank's tokens, position by position. Every half has a chunk of all sequences.
  void group(const ContextShards& context, std::int64_t count) {
    grouped.clear();
    const std::int64_t length = context.chunk_len();
    for (std::int64_t half = 0; half < context.halves(); ++half)
      for (std::int64_t position = 0; position < length; ++position)
        for (std::int64_t s = 0; s < count; ++s)
          grouped.push_back(static_cast<std::int32_t>((half * count + s) * length + position));
  }
  struct Asked {
    bool by_sequence, routed, grouped;
  };
  // Makes `batch` of the vectors.
  void place(Exec& ex, const Batch& whole, const Asked& asked) {
    batch = {};
    std::vector<PlacedVectors::Part> parts = {
        {tokens, batch.tokens_T}, {targets, batch.targets_T}, {positions, batch.places.positions_T}};
    if (whole.document_T.given()) parts.push_back({documents, batch.places.document_T});
    if (asked.by_sequence) parts.push_back({sequences, batch.sequence_T});
    if (asked.routed) {
      parts.push_back({places, batch.routed.place_T});
      parts.push_back({rows, batch.routed.row_N});
    }
    if (asked.grouped) parts.push_back({grouped, batch.groups.row_N});
    placed.place(ex, parts);
    batch.places.seq_len = whole.seq_len;
    batch.places.runs = runs;
    batch.sequences = asked.by_sequence ? whole.sequences() : 0;
  }
};

struct Pipeline::Flight {
  explicit Flight(Device device) : keep(device, arena_address_space(device), "activations") {}
  Arena keep;
  Transformer::Saved saved;
  bool is_first = false;       // of the model's chunks
  TensorView pool_2E, all_2E;  // of the chunks so far, and of all; without mixtures no shape
  std::vector<Pending> sends;  // read `keep` until they are through
  void reset() {
    for (Pending& p : sends) p.wait();
    sends.clear();
    saved = {};
    pool_2E = all_2E = {};
    keep.rewind(0);
  }
};

// Activations and gradients have a group each: between two stages both directions may carry both.
struct Pipeline::Link {
  // closed: the last stage's chunks are followed by chunks of the first.
  Link(Communicator& stages, bool closed)
      : forward(stages.subgroup(everyone(stages))), backward(stages.subgroup(everyone(stages))) {
    forward->connect(ring_routes(stages.size(), false, closed));
    backward->connect(ring_routes(stages.size(), true, closed));
  }
  static std::vector<int> everyone(const Communicator& group) {
    std::vector<int> all(static_cast<std::size_t>(group.size()));
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  std::unique_ptr<Communicator> forward, backward;

  int next() const { return (forward->rank() + 1) % forward->size(); }
  int previous() const { return (forward->rank() + forward->size() - 1) % forward->size(); }

  // The pool goes along where there is one, in one operation.
  void send(Exec& ex, Communicator& to, int rank, ConstTensorView x_tD, ConstTensorView pool_2E,
            std::vector<Pending>& sends) const {
    const std::array together{x_tD, pool_2E};
    sends.push_back(to.send(std::span(together).first(pool_2E.given() ? 2 : 1), rank, ex));
  }
  void receive(Exec& ex, Communicator& from, int rank, TensorView x_tD, TensorView pool_2E) const {
    const std::array together{x_tD, pool_2E};
    from.recv(std::span(together).first(pool_2E.given() ? 2 : 1), rank, ex);
  }
};

// fp64: z, what was lost and the values of the balance terms, the loss, the assignments of the model's mixtures; with a
// teacher the divergence from it.
struct Pipeline::Totals {
  TensorView all_n;
  std::int64_t terms = 0, mixtures = 0, experts = 0;
  std::int64_t assigned_end() const { return terms + 3 + mixtures * experts; }
  TensorView values_V() const { return all_n.rows(0, terms + 2); }
  TensorView loss_1() const { return all_n.rows(terms + 2, terms + 3); }
  TensorView assigned_ME(std::int64_t begin, std::int64_t end) const {
    return all_n.rows(terms + 3, assigned_end()).reshape({mixtures, experts}).rows(begin, end);
  }
  TensorView divergence_1() const { return all_n.rows(assigned_end(), assigned_end() + 1); }
};

Pipeline::Pipeline(const ModelConfig& config, const ProcessMesh& mesh, const StagePlan& plan,
                   const std::vector<Transformer>& chunks, Device device)
    : chunks_(chunks),
      plan_(plan),
      stage_(mesh.coord(Axis::kPp)),
      counts_(mesh.coord(Axis::kCp) == 0 && mesh.coord(Axis::kTp) == 0),
      num_experts_(config.num_moe_layers() > 0 ? config.num_experts : 0),
      routers_know_tokens_(config.num_moe_layers() > 0 && config.router.knows_tokens()),
      group_size_(config.routes_groups() ? config.router.group_size : 0),
      context_{mesh.coord(Axis::kCp), mesh.spec().cp, 0},
      device_(device) {
  for (int i = 0; i < config.num_hidden_layers; ++i)
    moe_of_block_.push_back(config.is_moe_layer(i) ? static_cast<int>(mixtures_++) : -1);
  if (plan.stages > 1) link_ = std::make_unique<Link>(mesh.along(Axis::kPp), chunks.size() > 1);
}

Pipeline::~Pipeline() = default;

std::unique_ptr<Pipeline::Shard> Pipeline::cut(Exec& ex, const Batch& batch, const Step* step) {
  ContextShards context = context_;
  context.seq_len = batch.seq_len;
  std::unique_ptr<Shard> shard;
  if (idle_shards_.empty()) {
    shard = std::make_unique<Shard>();
  } else {
    shard = std::move(idle_shards_.back());
    idle_shards_.pop_back();
  }
  shard->cut(context, batch);
  const bool by_sequence = step != nullptr && step->balance.has(AuxKind::kSequence),
             routed = step != nullptr && routers_know_tokens_, grouped = group_size_ > 0;
  if (by_sequence) shard->number(context, batch.sequences());
  if (routed) shard->find_places(context, batch.sequences());
  if (grouped) shard->group(context, batch.sequences());
  shard->place(ex, batch, {by_sequence, routed, grouped});
  MicroBatch& made = shard->batch;
  if (grouped) {
    made.groups.same = batch.sequences();
    made.groups.size = group_size_;
  }
  if (step == nullptr) return shard;
  made.weights = step->balance.has(AuxKind::kImportance);
  made.chances = step->balance.has(AuxKind::kLoad);
  if (!routed) return shard;
  made.routed.seq_len = batch.seq_len;
  made.routed.seed = step->seed;
  const auto before = static_cast<std::uint64_t>(std::max<std::int64_t>(0, batch.index));
  made.routed.first = step->first_token + before * shard->rows.size();
  return shard;
}

std::unique_ptr<Pipeline::Flight> Pipeline::take_flight() {
  // The oldest one's sends may still wait for a stage that in turn waits for this one when chunks are
  // interleaved: it rests until as many others as there are stages have come back.
  const std::size_t rest = chunks_.size() > 1 ? static_cast<std::size_t>(plan_.stages) : 0;
  if (idle_.size() <= rest) return std::make_unique<Flight>(device_);
  std::unique_ptr<Flight> flight = std::move(idle_.front());
  idle_.erase(idle_.begin());
  flight->reset();
  return flight;
}

// The chunk's loads to those of the chunks before it and, on one of the ranks that share them, to the step's.
void Pipeline::pool_loads(Exec& ex, const Transformer& chunk, Flight& f, const Totals& totals) const {
  const ConstTensorView loads_ML = f.saved.loads_ML;
  const auto first = std::find_if(moe_of_block_.begin() + chunk.first_block, moe_of_block_.end(),
                                  [](int mixture) { return mixture >= 0; });
  TensorView assigned_ME;
  if (counts_ && loads_ML.rows() > 0) assigned_ME = totals.assigned_ME(*first, *first + loads_ML.rows());
  ops::pool_loads(ex, f.pool_2E, assigned_ME, loads_ML,
                  f.is_first ? Accumulate::kOverwrite : Accumulate::kAdd);
}

Pipeline::Totals Pipeline::take_totals(Exec& ex, std::size_t terms, bool taught) {
  Totals totals{{}, static_cast<std::int64_t>(terms), mixtures_, num_experts_};
  const std::int64_t n = totals.assigned_end() + (taught ? 1 : 0);
  const std::vector<double> zeros(static_cast<std::size_t>(n));
  const std::size_t bytes = zeros.size() * sizeof(double);
  if (totals_.bytes() < bytes) totals_ = Buffer::allocate(device_, bytes, "sums of a step");
  totals.all_n = totals_.view({n}, DType::kF64);
  ops::upload(ex, totals.all_n, host_view(zeros.data(), {n}));
  return totals;
}

StepSums Pipeline::read_totals(Exec& ex, const Totals& totals) const {
  std::vector<double> read(static_cast<std::size_t>(totals.all_n.elements()));
  Totals on_host = totals;
  on_host.all_n = host_view(read.data(), totals.all_n.shape);
  ops::download(ex, on_host.all_n, totals.all_n);
  const auto values = [](const TensorView& t) {
    return std::span(t.as<double>(), static_cast<std::size_t>(t.elements()));
  };
  StepSums sums;
  const std::span<const double> z_lost_aux = values(on_host.values_V());
  sums.z = z_lost_aux[0];
  sums.lost = z_lost_aux[1];
  sums.aux.assign(z_lost_aux.begin() + 2, z_lost_aux.end());
  sums.loss = values(on_host.loss_1()).front();
  if (totals.assigned_end() < totals.all_n.elements())
    sums.divergence = values(on_host.divergence_1()).front();
  for (std::int64_t m = 0; m < mixtures_; ++m) {
    const auto assigned = values(on_host.assigned_ME(m, m + 1));
    sums.assigned.emplace_back(assigned.begin(), assigned.end());
  }
  return sums;
}

MicroBatch Pipeline::taught(Exec& ex, const Step& step, const MicroBatch& batch, Arena& keep) const {
  MicroBatch all = batch;
  if (step.teacher == nullptr) return all;
  UPMOE_CHECK(plan_.stages == 1, "a teacher beside a pipeline of {} stages", plan_.stages);
  Exec teacher = for_teacher(ex);
  all.soft = {&step.teacher->output->head, step.teacher->head_input(teacher, batch, keep), step.distillation};
  return all;
}

void Pipeline::forward(Exec& ex, const Step& step, const PipelineAction& action, const Totals& totals) {
  const std::size_t c = global_chunk(action.chunk);
  const Transformer& chunk = chunks_[static_cast<std::size_t>(action.chunk)];
  std::unique_ptr<Shard>& shard = shards_[action.micro_batch];
  if (shard == nullptr) shard = cut(ex, step.batches.next(), &step);
  std::unique_ptr<Flight> f = take_flight();
  if (mixtures_ > 0)
    f->pool_2E = f->keep.take({2 * num_experts_}, DType::kF64, "loads of all mixtures so far");
  f->is_first = c == 0;
  ConstTensorView input_tD;
  if (c > 0) {
    TensorView received_tD =
        f->keep.take({chunk.own_tokens(shard->batch), chunk.hidden_size}, chunk.dtype, "chunk input");
    // The router loads of the chunks so far come with the activations; this chunk's are added, and the last chunk has
    // all.
    link_->receive(ex, *link_->forward, link_->previous(), received_tD, f->pool_2E);
    input_tD = received_tD;
  }
  const MicroBatch batch = taught(ex, step, shard->batch, f->keep);
  chunk.forward(ex, batch, input_tD, step.loss_scale, f->keep, f->saved, step.before_block);
  if (mixtures_ > 0) pool_loads(ex, chunk, *f, totals);
  if (f->saved.loss_1.given()) ops::add_sums(ex, totals.loss_1(), f->saved.loss_1);
  if (f->saved.divergence_1.given()) ops::add_sums(ex, totals.divergence_1(), f->saved.divergence_1);
  f->all_2E = f->pool_2E;
  if (c + 1 < plan_.chunks.size())
    link_->send(ex, *link_->forward, link_->next(), f->saved.output_tD, f->pool_2E, f->sends);
  under_way_[{action.micro_batch, action.chunk}] = std::move(f);
}

void Pipeline::backward(Exec& ex, const Step& step, const PipelineAction& action, const Totals& totals) {
  const std::size_t c = global_chunk(action.chunk);
  const Transformer& chunk = chunks_[static_cast<std::size_t>(action.chunk)];
  const auto at = under_way_.find({action.micro_batch, action.chunk});
  std::unique_ptr<Flight> f = std::move(at->second);
  under_way_.erase(at);
  TensorView g_tD = f->keep.take(f->saved.output_tD.shape, chunk.dtype, "residual stream gradient");
  if (c + 1 < plan_.chunks.size()) {
    if (mixtures_ > 0) f->all_2E = f->keep.take({2 * num_experts_}, DType::kF64, "loads of all mixtures");
    link_->receive(ex, *link_->backward, link_->next(), g_tD, f->all_2E);
  }
  // The balance terms' gradients need the loads of all chunks, which come back with the gradient from the last one.
  chunk.set_balance(ex, step.balance, {f->all_2E, mixtures_, counts_ ? totals.values_V() : TensorView{}},
                    f->keep, f->saved);
  const bool last = action.micro_batch + 1 == step.batches.rounds();
  chunk.backward(ex, g_tD, f->keep, f->saved, [&](int block) {
    if (step.block_done) step.block_done(block, last);
  });
  if (c > 0) {
    link_->send(ex, *link_->backward, link_->previous(), g_tD, f->all_2E, f->sends);
  }
  if (action.chunk == 0) {
    const auto shard = shards_.find(action.micro_batch);
    idle_shards_.push_back(std::move(shard->second));
    shards_.erase(shard);
  }
  idle_.push_back(std::move(f));
}

StepSums Pipeline::run(Exec& ex, const Step& step) {
  const Totals totals = take_totals(ex, step.balance.terms.size(), step.teacher != nullptr);
  const auto micro_batches = static_cast<int>(step.batches.rounds());
  for (const PipelineAction& action :
       pipeline_schedule(plan_.stages, stage_, static_cast<int>(chunks_.size()), micro_batches)) {
    watchdog::heartbeat();
    action.forward ? forward(ex, step, action, totals) : backward(ex, step, action, totals);
  }
  for (const std::unique_ptr<Flight>& f : idle_) f->reset();
  if (step.block_done) step.block_done(-1, true);
  return read_totals(ex, totals);
}

double Pipeline::evaluate(Exec& ex, const Batch& batch, const LmHead::Sink& sink,
                          const Transformer::SeeRouting& routing) {
  watchdog::heartbeat();
  std::unique_ptr<Shard> shard = cut(ex, batch, nullptr);
  double loss = 0;
  for (std::size_t i = 0; i < chunks_.size(); ++i) {
    const std::size_t c = global_chunk(static_cast<int>(i));
    const Transformer& chunk = chunks_[i];
    std::unique_ptr<Flight> f = take_flight();
    TensorView input_tD;
    if (c > 0) {
      input_tD =
          f->keep.take({chunk.own_tokens(shard->batch), chunk.hidden_size}, chunk.dtype, "chunk input");
      link_->forward->recv(input_tD, link_->previous(), ex);
    }
    const Transformer::Evaluated result = chunk.evaluate(ex, shard->batch, input_tD, f->keep, sink, routing);
    loss += result.loss;
    if (c + 1 < plan_.chunks.size())
      f->sends.push_back(link_->forward->send(result.output_tD, link_->next(), ex));
    f->reset();
    idle_.push_back(std::move(f));
  }
  idle_shards_.push_back(std::move(shard));
  return loss;
}

std::size_t Pipeline::peak_bytes() const {
  std::size_t bytes = 0;
  for (const auto& f : idle_) bytes += f->keep.peak();
  for (const auto& [key, f] : under_way_) bytes += f->keep.peak();
  return bytes;
}

}  // namespace upmoe
