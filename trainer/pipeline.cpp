#include "trainer/pipeline.h"

#include <algorithm>
#include <numeric>

#include "kernels/ops/transfer.h"
#include "parallel/watchdog.h"

namespace upmoe {

struct Pipeline::Shard {
  // The last four are empty where nobody asks for them.
  std::vector<std::int32_t> tokens, targets, positions, documents, sequences, places, rows, grouped;
  Buffer on_device;  // the same, where the device is not the host
  MicroBatch batch;

  // This rank's part of every sequence.
  void cut(const ContextShards& context, const Batch& whole) {
    const auto part = [&](const ConstTensorView& values_T) {
      return context.take(values_T.as<std::int32_t>(), whole.sequences());
    };
    tokens = part(whole.tokens_T);
    targets = part(whole.targets_T);
    positions = part(whole.positions_T);
    if (whole.document_T.given()) documents = part(whole.document_T);
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
    struct Part {
      const std::vector<std::int32_t>& values;
      bool wanted;
      ConstTensorView& view;
    };
    batch = {};
    const Part parts[] = {{tokens, true, batch.tokens_T},
                          {targets, true, batch.targets_T},
                          {positions, true, batch.places.positions_T},
                          {documents, whole.document_T.given(), batch.places.document_T},
                          {sequences, asked.by_sequence, batch.sequence_T},
                          {places, asked.routed, batch.routed.place_T},
                          {rows, asked.routed, batch.routed.row_N},
                          {grouped, asked.grouped, batch.groups.row_N}};
    std::size_t total = 0, at = 0;
    for (const Part& p : parts) total += p.wanted ? p.values.size() : 0;
    const bool here = ex.device.type == DeviceType::kCpu;
    if (!here && on_device.bytes() < total * sizeof(std::int32_t))
      on_device = Buffer::allocate(ex.device, total * sizeof(std::int32_t), "tokens");
    for (const Part& p : parts) {
      if (!p.wanted) continue;
      const auto n = static_cast<std::int64_t>(p.values.size()), begin = static_cast<std::int64_t>(at);
      const ConstTensorView on_host = host_view(p.values.data(), {n});
      p.view = on_host;
      at += p.values.size();
      if (here) continue;
      const TensorView view =
          on_device.view({static_cast<std::int64_t>(total)}, DType::kI32).rows(begin, begin + n);
      ops::upload(ex, view, on_host);
      p.view = view;
    }
    batch.places.seq_len = whole.seq_len;
    batch.sequences = asked.by_sequence ? whole.sequences() : 0;
  }
};

struct Pipeline::Flight {
  explicit Flight(Device device) : keep(device, arena_address_space(device), "activations") {}
  Arena keep;
  Transformer::Saved saved;
  LoadPool pool;  // of the chunks so far, then of all
  std::vector<double> pool_forward, pool_backward;
  std::vector<Pending> sends;  // read `keep` and the pools until they are through
  void reset() {
    for (Pending& p : sends) p.wait();
    sends.clear();
    saved = {};
    pool = {};
    keep.rewind(0);
  }
};

// Activations and gradients have a group each: between two stages both directions may carry both.
struct Pipeline::Link {
  // closed: the last stage's chunks are followed by chunks of the first.
  Link(Communicator& stages, bool closed, std::int64_t experts_)
      : forward(stages.subgroup(everyone(stages))),
        backward(stages.subgroup(everyone(stages))),
        experts(static_cast<std::size_t>(experts_)) {
    forward->connect(ring_routes(stages.size(), false, closed));
    backward->connect(ring_routes(stages.size(), true, closed));
  }
  static std::vector<int> everyone(const Communicator& group) {
    std::vector<int> all(static_cast<std::size_t>(group.size()));
    std::iota(all.begin(), all.end(), 0);
    return all;
  }
  std::unique_ptr<Communicator> forward, backward;
  std::size_t experts;  // of a mixture, whose pool travels too; 0 without mixtures

  int next() const { return (forward->rank() + 1) % forward->size(); }
  int previous() const { return (forward->rank() + forward->size() - 1) % forward->size(); }

  void send(Exec& ex, Communicator& to, int rank, ConstTensorView x_tD, const LoadPool& all,
            std::vector<double>& packed, std::vector<Pending>& sends) const {
    sends.push_back(to.send(x_tD, rank, ex));
    if (experts == 0) return;
    packed = all.pack(experts);
    const auto size = static_cast<std::int64_t>(packed.size());
    sends.push_back(to.send(host_view(static_cast<const double*>(packed.data()), {size}), rank, ex));
  }
  LoadPool receive(Exec& ex, Communicator& from, int rank, TensorView x_tD) const {
    from.recv(x_tD, rank, ex);
    if (experts == 0) return {};
    std::vector<double> packed(LoadPool::packed_size(experts));
    from.recv(host_view(packed.data(), {static_cast<std::int64_t>(packed.size())}), rank, ex);
    return LoadPool::unpack(packed);
  }
};

Pipeline::Pipeline(const ModelConfig& config, const ProcessMesh& mesh, const StagePlan& plan,
                   const std::vector<Transformer>& chunks, Device device)
    : chunks_(chunks),
      plan_(plan),
      stage_(mesh.coord(Axis::kPp)),
      counts_(mesh.coord(Axis::kCp) == 0 && mesh.coord(Axis::kTp) == 0),
      num_experts_(config.num_moe_layers() > 0 ? config.num_experts : 0),
      routers_know_tokens_(config.num_moe_layers() > 0 && config.router.knows_tokens()),
      group_size_(config.num_moe_layers() > 0 && config.router.routes_groups() ? config.router.group_size
                                                                               : 0),
      context_{mesh.coord(Axis::kCp), mesh.spec().cp, 0},
      device_(device) {
  for (int i = 0; i < config.num_hidden_layers; ++i)
    moe_of_block_.push_back(config.is_moe_layer(i) ? static_cast<int>(mixtures_++) : -1);
  if (plan.stages > 1) link_ = std::make_unique<Link>(mesh.along(Axis::kPp), chunks.size() > 1, num_experts_);
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

void Pipeline::count_loads(const Transformer& chunk, const Transformer::Saved& saved, StepSums& sums) const {
  if (!counts_) return;
  std::size_t at = 0;
  for (std::size_t i = 0; i < chunk.blocks.size(); ++i) {
    const int mixture = moe_of_block_[static_cast<std::size_t>(chunk.first_block) + i];
    if (mixture < 0) continue;
    std::vector<double>& layer = sums.assigned[static_cast<std::size_t>(mixture)];
    const LayerLoad& load = saved.loads[at++];
    for (std::size_t e = 0; e < load.assigned.size(); ++e) layer[e] += load.assigned[e];
    sums.lost += load.lost;
  }
}

void Pipeline::forward(Exec& ex, const Step& step, const PipelineAction& action, StepSums& sums) {
  const std::size_t c = global_chunk(action.chunk);
  const Transformer& chunk = chunks_[static_cast<std::size_t>(action.chunk)];
  std::unique_ptr<Shard>& shard = shards_[action.micro_batch];
  if (shard == nullptr) shard = cut(ex, step.batches.next(), &step);
  std::unique_ptr<Flight> f = take_flight();
  ConstTensorView input_tD;
  if (c > 0) {
    TensorView received_tD =
        f->keep.take({chunk.own_tokens(shard->batch), chunk.hidden_size}, chunk.dtype, "chunk input");
    // The router loads of the chunks so far come with the activations; this chunk's are added, and the last chunk has
    // all.
    f->pool = link_->receive(ex, *link_->forward, link_->previous(), received_tD);
    input_tD = received_tD;
  }
  chunk.forward(ex, shard->batch, input_tD, step.loss_scale, f->keep, f->saved, step.before_block);
  for (const LayerLoad& load : f->saved.loads) f->pool.add(load);
  count_loads(chunk, f->saved, sums);
  sums.loss += f->saved.loss;
  if (c + 1 < plan_.chunks.size())
    link_->send(ex, *link_->forward, link_->next(), f->saved.output_tD, f->pool, f->pool_forward, f->sends);
  under_way_[{action.micro_batch, action.chunk}] = std::move(f);
}

void Pipeline::backward(Exec& ex, const Step& step, const PipelineAction& action, StepSums& sums) {
  const std::size_t c = global_chunk(action.chunk);
  const Transformer& chunk = chunks_[static_cast<std::size_t>(action.chunk)];
  const auto at = under_way_.find({action.micro_batch, action.chunk});
  std::unique_ptr<Flight> f = std::move(at->second);
  under_way_.erase(at);
  TensorView g_tD = f->keep.take(f->saved.output_tD.shape, chunk.dtype, "residual stream gradient");
  if (c + 1 < plan_.chunks.size()) f->pool = link_->receive(ex, *link_->backward, link_->next(), g_tD);
  // The balance terms' gradients need the loads of all chunks, which come back with the gradient from the last one.
  chunk.set_balance(ex, step.balance, f->pool, f->keep, f->saved);
  if (counts_) {
    for (std::size_t i = 0; i < f->saved.balance.aux.size(); ++i) sums.aux[i] += f->saved.balance.aux[i];
    sums.z += f->saved.balance.z;
  }
  const bool last = action.micro_batch + 1 == step.batches.rounds();
  chunk.backward(ex, g_tD, f->keep, f->saved, [&](int block) {
    if (step.block_done) step.block_done(block, last);
  });
  if (c > 0) {
    link_->send(ex, *link_->backward, link_->previous(), g_tD, f->pool, f->pool_backward, f->sends);
  }
  if (action.chunk == 0) {
    const auto shard = shards_.find(action.micro_batch);
    idle_shards_.push_back(std::move(shard->second));
    shards_.erase(shard);
  }
  idle_.push_back(std::move(f));
}

StepSums Pipeline::run(Exec& ex, const Step& step) {
  StepSums sums;
  sums.aux.assign(step.balance.terms.size(), 0.0);
  sums.assigned.assign(mixtures_, std::vector<double>(static_cast<std::size_t>(num_experts_)));
  const auto micro_batches = static_cast<int>(step.batches.rounds());
  for (const PipelineAction& action :
       pipeline_schedule(plan_.stages, stage_, static_cast<int>(chunks_.size()), micro_batches)) {
    watchdog::heartbeat();
    action.forward ? forward(ex, step, action, sums) : backward(ex, step, action, sums);
  }
  for (const std::unique_ptr<Flight>& f : idle_) f->reset();
  if (step.block_done) step.block_done(-1, true);
  return sums;
}

double Pipeline::evaluate(Exec& ex, const Batch& batch, const LmHead::Sink& sink) {
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
    const Transformer::Evaluated result = chunk.evaluate(ex, shard->batch, input_tD, f->keep, sink);
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
