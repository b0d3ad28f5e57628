#include "launch/prompt_rows.h"

#include <memory>

#include "data/model_source.h"
#include "data/tokenizer_match.h"
#include "kernels/core/log.h"
#include "launch/whole_model.h"
#include "parallel/self_comm.h"
#include "trainer/ffn_inputs.h"

namespace upmoe {

Calibration prompt_rows(const std::filesystem::path& dense, int experts, const PromptRequest& request) {
  const int files = static_cast<int>(request.files.size());
  if (experts % files != 0)
    fail(ExitCode::kUsage, "--prompts is given {} times: no equal parts of {} experts", files, experts);
  const std::unique_ptr<ModelSource> source = open_model(dense);
  const std::unique_ptr<Communicator> self = make_self_communicator();
  const std::unique_ptr<RankModel> model = whole_model(*source, *self, Precision::kFp32);
  Calibration calibration;
  calibration.layers.resize(static_cast<std::size_t>(source->config().num_hidden_layers));
  for (const std::filesystem::path& file : request.files) {
    log::info("hidden states of {}", file.string());
    const TokenDataset data({{file, 1.0}}, request.seq_len, false, 0, source->config().vocab_size);
    for (const std::string& words : tokenizer_differences(source->companions(), data.files()))
      log::warning("{}", words);
    const std::vector<std::vector<float>> directions = mean_directions(*model, data, request.sequences);
    for (std::size_t layer = 0; layer < directions.size(); ++layer) {
      std::vector<float>& rows = calibration.layers[layer].router_ED;
      for (int e = 0; e < experts / files; ++e)
        rows.insert(rows.end(), directions[layer].begin(), directions[layer].end());
    }
  }
  return calibration;
}

}  // namespace upmoe
