#include "trainer/pipeline.h"

#include <algorithm>
#include <numeric>

#include "kernels/ops/transfer.h"
#include "parallel/watchdog.h"

namespace upmoe {

struct Pipeline::Shard {
  std::vector<std::int32_t> tokens, targets, positions, documents, sequences;
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
  // Makes `batch` of the vectors; an empty one of the last two is not asked for.
  void place(Exec& ex, std::int64_t seq_len, bool masked) {
    const auto T = static_cast<std::int64_t>(tokens.size());
    const std::vector<std::int32_t>* all[] = {&tokens, &targets, &positions, &documents, &sequences};
    const bool wanted[] = {true, true, true, masked, !sequences.empty()};
    ConstTensorView views[5];
    if (ex.device.type == DeviceType::kCpu) {
      for (int i = 0; i < 5; ++i)
        if (wanted[i]) views[i] = host_view(all[i]->data(), {T});
    } else {
      const std::size_t bytes = 5 * tokens.size() * sizeof(std::int32_t);
      if (on_device.bytes() < bytes) on_device = Buffer::allocate(ex.device, bytes, "tokens");
      for (int i = 0; i < 5; ++i) {
        const TensorView view = on_device.view({5, T}, DType::kI32).rows(i, i + 1).reshape({T});
        if (!wanted[i]) continue;
        ops::upload(ex, view, host_view(all[i]->data(), {T}));
        views[i] = view;
      }
    }
    batch = {views[0], views[1], {views[2], {}, seq_len}};
    batch.places.document_T = views[3];
    batch.sequence_T = views[4];
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
      context_{mesh.coord(Axis::kCp), mesh.spec().cp, 0},
      device_(device) {
  for (int i = 0; i < config.num_hidden_layers; ++i)
    moe_of_block_.push_back(config.is_moe_layer(i) ? static_cast<int>(mixtures_++) : -1);
  if (plan.stages > 1) link_ = std::make_unique<Link>(mesh.along(Axis::kPp), chunks.size() > 1, num_experts_);
}

Pipeline::~Pipeline() = default;

std::unique_ptr<Pipeline::Shard> Pipeline::cut(Exec& ex, const Batch& batch, bool by_sequence) {
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
  shard->sequences.clear();
  if (by_sequence) shard->number(context, batch.sequences());
  shard->place(ex, batch.seq_len, batch.document_T.given());
  shard->batch.sequences = by_sequence ? batch.sequences() : 0;
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
    const std::vector<double>& assigned = saved.loads[at++].assigned;
    for (std::size_t e = 0; e < assigned.size(); ++e) layer[e] += assigned[e];
  }
}

void Pipeline::forward(Exec& ex, const Step& step, const PipelineAction& action, StepSums& sums) {
  const std::size_t c = global_chunk(action.chunk);
  const Transformer& chunk = chunks_[static_cast<std::size_t>(action.chunk)];
  std::unique_ptr<Shard>& shard = shards_[action.micro_batch];
  if (shard == nullptr) shard = cut(ex, step.batches.next(), step.balance.has(AuxKind::kSequence));
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
  std::unique_ptr<Shard> shard = cut(ex, batch, false);
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
