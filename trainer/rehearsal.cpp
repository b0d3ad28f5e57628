#include "trainer/rehearsal.h"

#include <utility>

#include "configs/expert_use.h"
#include "trainer/batch_deal.h"

namespace upmoe {

// Micro-batches of a run's size, dealt as it deals them; their values are never looked at.
class DryBatches final : public BatchSource {
 public:
  DryBatches(const RunConfig& run, const ProcessMesh& mesh)
      : deal_(deal_of(mesh, run.train.micro_batches())),
        seq_len_(run.data.seq_len),
        masked_(run.data.mask_documents),
        masks_targets_(masks_targets(run.data)),
        values_(static_cast<std::size_t>(run.train.micro_batch * seq_len_)) {}

  void begin_step(std::int64_t rounds) {
    asked_ = rounds;
    round_ = 0;
  }
  std::int64_t rounds() const override { return asked_ > 0 ? asked_ : deal_.rounds(); }
  std::optional<std::int64_t> counted_targets() override {
    if (!masks_targets_) return {};
    return static_cast<std::int64_t>(values_.size());  // more than none
  }
  Batch next() override {
    Batch batch;
    batch.index = asked_ > 0 ? round_ * deal_.ranks + deal_.rank : deal_.index(round_);
    round_ = (round_ + 1) % rounds();
    const std::int64_t T = batch.index < 0 ? 0 : static_cast<std::int64_t>(values_.size());
    batch.tokens_T = host_view(std::as_const(values_).data(), {T});
    batch.targets_T = batch.positions_T = batch.tokens_T;
    if (masked_) batch.document_T = batch.tokens_T;
    batch.seq_len = seq_len_;
    return batch;
  }

 private:
  Deal deal_;
  std::int64_t seq_len_, asked_ = 0, round_ = 0;
  bool masked_, masks_targets_;
  std::vector<std::int32_t> values_;
};

Rehearsal::Rehearsal(const RunConfig& run, const ModelConfig& model, int rank, int ranks, DryWire* wire)
    : world_(make_dry_communicator(rank, ranks, wire)),
      session_(run, model, *world_, {DeviceType::kDry, 0}),
      trainer_(session_) {
  auto batches = std::make_unique<DryBatches>(run, session_.mesh);
  batches_ = batches.get();
  session_.batches = std::move(batches);
  // The only one there.
  if (run.device == DeviceChoice::kCpu) session_.memory.exec.experts = ExpertsPath::kStreams;
}

const Ledger& Rehearsal::step(std::int64_t rounds) {
  batches_->begin_step(rounds);
  trainer_.step(++steps_);
  return session_.memory.ledger;
}

Ledger rehearse_forward(const ModelConfig& config, std::int64_t seq_len) {
  const auto world = make_dry_communicator(0, 1);
  RankModel model(config, {}, *world, {DeviceType::kDry, 0}, {.dtype = DType::kBF16, .gradients = false});
  RunConfig run;
  run.data.seq_len = seq_len;
  run.train.global_batch = run.train.micro_batch = least_sequences(config);
  DryBatches batches(run, model.mesh);
  model.pipeline.evaluate(model.memory.exec, batches.next());
  return model.memory.ledger;
}

Ledger rehearse_prompt(const ModelConfig& config, std::int64_t tokens) {
  const auto world = make_dry_communicator(0, 1);
  const Device dry{DeviceType::kDry, 0};
  RankModel model(config, {}, *world, dry, {.dtype = DType::kBF16, .gradients = false});
  Arena keep(dry, 0, "keys, values and activations");
  Exec& ex = model.memory.exec;
  const Transformer& transformer = model.chunks.front();
  const KeyCaches caches(keep, transformer.attention_of_blocks(), 1, tokens, DType::kBF16);
  const TensorView numbers_T = keep.take({tokens}, DType::kI32, "tokens, rows, positions: nobody reads them");
  MicroBatch batch;
  batch.tokens_T = batch.targets_T = batch.places.positions_T = numbers_T;
  batch.places.seq_len = tokens;
  const CachedTokens cached{numbers_T, numbers_T, tokens * (tokens + 1) / 2, tokens};
  transformer.logits(ex, batch, {caches, cached, true, numbers_T.rows(0, 1)}, keep);
  return model.memory.ledger;
}

}  // namespace upmoe
