#include "trainer/ffn_inputs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "parallel/watchdog.h"

namespace upmoe {

void for_each_ffn_input(RankModel& model, const TokenDataset& data, std::int64_t sequences,
                        const std::function<void(int layer, ConstTensorView x_TD)>& see) {
  UPMOE_CHECK(model.mesh.spec().world() == 1 && model.memory.exec.device.type == DeviceType::kCpu,
              "hidden states of one rank on the CPU");
  const std::int64_t S = data.seq_len(), n = std::min(sequences, data.num_sequences());
  if (n == 0) fail(ExitCode::kBadInput, "the tokens have no whole sequence of {}", S);
  const auto length = static_cast<std::size_t>(S);
  std::vector<std::int32_t> tokens(length), targets(length), positions(length);
  std::iota(positions.begin(), positions.end(), 0);
  Arena keep(Device{}, arena_address_space(Device{}), "hidden states");
  const auto view = [&](const std::vector<std::int32_t>& values) { return host_view(values.data(), {S}); };
  for (std::int64_t i = 0; i < n; ++i) {
    data.read(i, tokens, targets, {}, {});
    MicroBatch batch;
    batch.tokens_T = view(tokens);
    batch.targets_T = view(targets);
    batch.places.positions_T = view(positions);
    batch.places.seq_len = S;
    batch.sequences = 1;
    const std::size_t mark = keep.mark();
    model.chunks.front().ffn_inputs(model.memory.exec, batch, {}, keep, see);
    keep.rewind(mark);
    watchdog::heartbeat();
  }
}

std::vector<std::vector<float>> mean_directions(RankModel& model, const TokenDataset& data,
                                                std::int64_t sequences) {
  const auto D = static_cast<std::size_t>(model.config.hidden_size);
  std::vector<std::vector<double>> sums(static_cast<std::size_t>(model.config.num_hidden_layers),
                                        std::vector<double>(D, 0.0));
  for_each_ffn_input(model, data, sequences, [&](int layer, ConstTensorView x_TD) {
    std::vector<double>& sum = sums[static_cast<std::size_t>(layer)];
    const float* x = x_TD.as<float>();
    for (std::int64_t t = 0; t < x_TD.rows(); ++t)
      for (std::size_t d = 0; d < D; ++d) sum[d] += *x++;
  });
  std::vector<std::vector<float>> directions;
  for (const std::vector<double>& sum : sums) {
    const double square = std::inner_product(sum.begin(), sum.end(), sum.begin(), 0.0);
    if (!(square > 0))
      fail(ExitCode::kBadInput, "layer {}: the mean of the hidden states is zero, or not finite",
           directions.size());
    std::vector<float>& direction = directions.emplace_back();
    for (const double v : sum) direction.push_back(static_cast<float>(v / std::sqrt(square)));
  }
  return directions;
}

}  // namespace upmoe
