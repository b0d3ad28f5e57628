#include "trainer/evaluation.h"
#include "trainer/batch_deal.h"

#include <algorithm>
#include <chrono>

namespace upmoe {

namespace {

// Micro-batches of consecutive sequences in file order; the last one may be smaller.
class HeldOut final : public BatchSource {
 public:
  HeldOut(const TokenDataset& data, std::int64_t sequences, const EvalOptions& options,
          const ProcessMesh& mesh)
      : data_(data),
        first_(options.begin),
        sequences_(sequences),
        micro_batch_(options.micro_batch),
        masked_(options.mask_documents),
        deal_(deal_of(mesh, (sequences + micro_batch_ - 1) / micro_batch_)) {
    const auto S = static_cast<std::size_t>(data.seq_len()), T = static_cast<std::size_t>(micro_batch_) * S;
    for (auto* values : {&tokens_, &targets_, &documents_, &positions_}) values->resize(T);
    for (std::size_t t = 0; t < T; ++t) positions_[t] = static_cast<std::int32_t>(t % S);
  }

  std::int64_t rounds() const override { return deal_.rounds(); }
  Batch next() override {
    Batch batch;
    batch.index = deal_.index(round_++);
    const std::int64_t begin = batch.index < 0 ? sequences_ : batch.index * micro_batch_,
                       end = std::min(sequences_, begin + micro_batch_), T = (end - begin) * data_.seq_len();
    for (std::int64_t i = begin; i < end; ++i) read(first_ + i, static_cast<std::size_t>(i - begin));
    const auto view = [&](const std::vector<std::int32_t>& values) { return host_view(values.data(), {T}); };
    batch.tokens_T = view(tokens_);
    batch.targets_T = view(targets_);
    batch.positions_T = view(positions_);
    if (masked_) batch.document_T = view(documents_);
    batch.seq_len = data_.seq_len();
    return batch;
  }

 private:
  void read(std::int64_t sequence, std::size_t place) {
    const auto S = static_cast<std::size_t>(data_.seq_len());
    const auto part = [&](std::vector<std::int32_t>& values) {
      return std::span(values).subspan(place * S, S);
    };
    if (masked_) {
      data_.read(sequence, part(tokens_), part(targets_), part(documents_), part(positions_));
    } else {
      data_.read(sequence, part(tokens_), part(targets_), {}, {});
    }
  }

  const TokenDataset& data_;
  std::int64_t first_, sequences_, micro_batch_, round_ = 0;
  bool masked_;
  Deal deal_;
  std::vector<std::int32_t> tokens_, targets_, documents_, positions_;
};

// Of a micro-batch, counted on one of the ranks that share it.
std::int64_t counted_targets(const Batch& batch, const ProcessMesh& mesh) {
  if (mesh.coord(Axis::kPp) != 0 || mesh.coord(Axis::kCp) != 0 || mesh.coord(Axis::kTp) != 0) return 0;
  const auto* targets = batch.targets_T.as<std::int32_t>();
  const std::int64_t rows = batch.targets_T.rows();
  return rows - std::count(targets, targets + rows, kIgnoredTarget);
}

}  // namespace

MeshSpec evaluation_mesh(const ModelConfig& config, int ranks) {
  MeshSpec spec;
  spec.dp = ranks;
  spec.ep = config.num_experts > 0 ? std::min(ranks, config.num_experts) : 1;
  while (ranks % spec.ep != 0) --spec.ep;
  return spec;
}

EvalResult evaluate(RankModel& model, const TokenDataset& data, const EvalOptions& options,
                    const LmHead::Sink& sink, const SeeRouting& routing) {
  const auto start = std::chrono::steady_clock::now();
  const std::int64_t available = std::max<std::int64_t>(0, data.num_sequences() - options.begin),
                     S = data.seq_len();
  const std::int64_t sequences = sequences_asked(options.sequences, available);
  if (sequences == 0) fail(ExitCode::kBadInput, "the held-out data has no whole sequence of {} tokens", S);
  UPMOE_CHECK((!sink && !routing) || model.mesh.spec().world() == 1, "logits and choices of one rank");

  double sums[2] = {0, 0};  // of the losses, and how many there are
  HeldOut batches(data, sequences, options, model.mesh);
  for (std::int64_t round = 0; round < batches.rounds(); ++round) {
    const Batch batch = batches.next();
    const std::int64_t first_row = batch.index * options.micro_batch * S;
    LmHead::Sink shifted;
    if (sink)
      shifted = [&](std::int64_t row, ConstTensorView logits_CV) { sink(first_row + row, logits_CV); };
    Transformer::SeeRouting placed;
    if (routing) placed = [&](int block, const Choices& choices) { routing(batch.tokens_T, block, choices); };
    sums[0] += model.pipeline.evaluate(model.memory.exec, batch, shifted, placed);
    sums[1] += static_cast<double>(counted_targets(batch, model.mesh));
  }
  model.mesh.world().all_reduce(host_view(sums, {2}), ReduceOp::kSum);
  if (sums[1] == 0)
    fail(ExitCode::kBadInput,
         "the loss mask of the held-out data leaves no target in its first {} sequences of {} tokens; "
         "evaluate more of them, or without the mask",
         sequences, S);
  EvalResult result;
  result.tokens = static_cast<std::int64_t>(sums[1]);
  result.loss = sums[0] / sums[1];
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace upmoe
