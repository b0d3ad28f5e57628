#include "trainer/same_inputs.h"

#include <fmt/format.h>

namespace upmoe {

std::string models_in_lines(const ModelConfig& config, const ModelSource* weights,
                            const ModelSource* teacher) {
  std::string models = weights == nullptr ? function_without_routers(config) + "\n" : "";
  for (const ModelSource* model : {weights, teacher})
    if (model != nullptr)
      models += model->directory().string() + "\n" + function_without_routers(model->config()) + "\n";
  return models;
}

// With a line for each file, as one host may have an older copy of it.
std::string data_in_lines(const TokenDataset& data) {
  std::string lines;
  for (const TokenFile* file : data.files())
    lines +=
        fmt::format("{}: tokens {}, documents {}, checksum {}\n", file->path().string(), file->num_tokens(),
                    file->document_ends().size(), file->identity().empty() ? "none" : file->identity());
  return lines + data.fingerprint();
}

void require_same_model(Communicator& world, const std::string& given, const ModelSource& source) {
  // A run directory goes on while it trains: each rank may have met another of its checkpoints. Or its host has a copy.
  require_equal(world, fmt::format("copies of {}", given),
                models_in_lines(source.config(), &source, nullptr));
  if (world.size() == 1) return;
  std::string digest;
  run_agreed(world, [&] { digest = digest_of(source); });
  require_equal(world, fmt::format("models in {}", given), digest);
}

void compare_models(Communicator& world, const ReadInputs& read) {
  // A run directory goes on while it trains: each rank may have met another of its checkpoints.
  require_equal(world, "copies of model.path or train.teacher.model", read.models);
  require_equal(world, "models in model.path or train.teacher.model", read.weights);
}

void compare_data(Communicator& world, const ReadInputs& read) {
  require_equal(world, "training data", read.data);
  require_equal(world, "held-out data", read.held_out);
}

}  // namespace upmoe
