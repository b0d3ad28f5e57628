#include "trainer/evaluation.h"

#include <algorithm>
#include <chrono>

namespace upmoe {

namespace {

// Host storage of one micro-batch of consecutive sequences.
struct HostBatch {
  std::vector<std::int32_t> tokens, targets, documents, positions;
  void read(const TokenDataset& data, std::int64_t first, std::int64_t sequences) {
    const auto S = static_cast<std::size_t>(data.seq_len());
    const std::size_t T = S * static_cast<std::size_t>(sequences);
    for (auto* v : {&tokens, &targets, &documents, &positions}) v->assign(T, 0);
    for (std::size_t i = 0; i < static_cast<std::size_t>(sequences); ++i)
      data.read(first + static_cast<std::int64_t>(i), std::span(tokens).subspan(i * S, S),
                std::span(targets).subspan(i * S, S), std::span(documents).subspan(i * S, S),
                std::span(positions).subspan(i * S, S));
  }
  HostTokens view(std::int64_t sequences, bool mask_documents) const {
    return {sequences, tokens.data(), targets.data(), positions.data(),
            mask_documents ? documents.data() : nullptr};
  }
  // Without masking, positions run over the whole sequence.
  void count_positions(std::int64_t seq_len) {
    for (std::size_t t = 0; t < positions.size(); ++t)
      positions[t] = static_cast<std::int32_t>(static_cast<std::int64_t>(t) % seq_len);
  }
};

}  // namespace

EvalResult evaluate(Exec& ex, Pipeline& pipeline, const ProcessMesh& mesh, const TokenDataset& data,
                    const EvalOptions& options, const LmHead::Sink& sink) {
  const auto start = std::chrono::steady_clock::now();
  const std::int64_t available = data.num_sequences(), S = data.seq_len();
  const std::int64_t sequences = options.sequences == 0 ? available : std::min(options.sequences, available);
  if (sequences == 0) fail(ExitCode::kBadInput, "the held-out data has no whole sequence of {} tokens", S);
  const std::int64_t M = options.micro_batch, batches = (sequences + M - 1) / M;
  const std::int64_t ranks = mesh.spec().dp, rank = mesh.coord(Axis::kDp);
  UPMOE_CHECK(!sink || mesh.spec().world() == 1, "logits of one rank");

  double sum = 0;
  HostBatch host;
  for (std::int64_t first = 0; first < batches; first += ranks) {
    const std::int64_t b = first + rank;  // past the end: no tokens, but the expert exchange wants everybody
    const std::int64_t begin = std::min(sequences, b * M), end = std::min(sequences, begin + M);
    host.read(data, begin, end - begin);
    if (!options.mask_documents) host.count_positions(S);
    const LmHead::Sink shifted = sink ? LmHead::Sink([&](std::int64_t row, ConstTensorView logits_CV) {
      sink(begin * S + row, logits_CV);
    })
                                      : LmHead::Sink{};
    sum += pipeline.evaluate(ex, host.view(end - begin, options.mask_documents), S, shifted);
  }
  mesh.world().all_reduce(host_view(&sum, {1}), ReduceOp::kSum);
  EvalResult result;
  result.tokens = sequences * S;
  result.loss = sum / static_cast<double>(result.tokens);
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace upmoe
