#include "launch/calibration.h"

#include <memory>

#include "data/model_source.h"
#include "kernels/core/log.h"
#include "launch/token_sets.h"
#include "launch/whole_model.h"
#include "parallel/self_comm.h"
#include "parallel/watchdog.h"
#include "trainer/ffn_inputs.h"
#include "upcycle/neuron_activity.h"

namespace upmoe {
namespace {

// The dense model in the trainer.
class Asked {
 public:
  explicit Asked(const std::filesystem::path& dense)
      : source_(open_model(dense)), model_(whole_model(*source_, *self_, Precision::kFp32)) {}
  RankModel& model() { return *model_; }
  std::size_t layers() const { return static_cast<std::size_t>(source_->config().num_hidden_layers); }
  std::unique_ptr<TokenDataset> tokens(const std::filesystem::path& file, std::int64_t seq_len) const {
    log::info("hidden states of {}", file.string());
    return std::move(open_token_sets(*source_, {.files = {file}, .seq_len = seq_len}).front());
  }

 private:
  std::unique_ptr<Communicator> self_ = make_self_communicator();
  std::unique_ptr<ModelSource> source_;
  std::unique_ptr<RankModel> model_;
};

void add_prompt_rows(Asked& asked, int experts, const TokenRequest& request, Calibration& calibration) {
  const int files = static_cast<int>(request.files.size());
  if (files == 0 || experts % files != 0)
    fail(ExitCode::kUsage, "--prompts is given {} times: no equal parts of {} experts", files, experts);
  for (const std::filesystem::path& file : request.files) {
    const std::unique_ptr<TokenDataset> data = asked.tokens(file, request.seq_len);
    const std::vector<std::vector<float>> directions =
        mean_directions(asked.model(), *data, request.sequences);
    for (std::size_t layer = 0; layer < directions.size(); ++layer) {
      std::vector<float>& rows = calibration.layers[layer].router_ED;
      for (int e = 0; e < experts / files; ++e)
        rows.insert(rows.end(), directions[layer].begin(), directions[layer].end());
    }
  }
}

void add_clusters(Asked& asked, const UpcycleConfig& config, const std::filesystem::path& dense,
                  const TokenRequest& request, Calibration& calibration) {
  if (request.files.size() != 1)
    fail(ExitCode::kUsage, "experts.method cluster looks at one token file; --calibrate is given {} times",
         request.files.size());
  const std::unique_ptr<TokenDataset> data = asked.tokens(request.files.front(), request.seq_len);
  std::vector<std::vector<float>> x_TD(asked.layers());
  for_each_ffn_input(asked.model(), *data, request.sequences, [&](int layer, ConstTensorView x_SD) {
    std::vector<float>& all = x_TD[static_cast<std::size_t>(layer)];
    all.insert(all.end(), x_SD.as<float>(), x_SD.as<float>() + x_SD.elements());
  });
  const DenseSource source(dense);
  for (std::size_t layer = 0; layer < x_TD.size(); ++layer) {
    log::info("layer {} of {}: neurons that are active together", layer, x_TD.size());
    Calibration::Layer found =
        clustered_layer(config, *source.ffn(static_cast<int>(layer)), source.dtype(), x_TD[layer]);
    Calibration::Layer& to = calibration.layers[layer];
    to.order = std::move(found.order);
    if (!found.router_ED.empty()) to.router_ED = std::move(found.router_ED);
    x_TD[layer] = {};
    watchdog::heartbeat();
  }
}

}  // namespace

Calibration calibration_of(const UpcycleConfig& config, const std::filesystem::path& dense,
                           const TokenRequest& prompts, const TokenRequest& calibrate) {
  Asked asked(dense);
  Calibration calibration;
  calibration.layers.resize(asked.layers());
  if (config.router.method == RouterMethod::kPrompts)
    add_prompt_rows(asked, config.target.num_experts, prompts, calibration);
  if (config.experts.method == ExpertMethod::kCluster)
    add_clusters(asked, config, dense, calibrate, calibration);
  return calibration;
}

}  // namespace upmoe
