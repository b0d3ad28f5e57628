#pragma once
// What a command that computes with a model's weights is told of the model, of numbers and of devices: options that
// all such commands have, in the same words.

#include <CLI/CLI.hpp>
#include <string>

#include "configs/run_choices.h"
#include "launch/command_line.h"
#include "parallel/runtime.h"
#include "trainer/rank_model.h"

namespace upmoe {

struct ComputeOptions {
  Precision precision = Precision::kFp32;
  RouterDType router = RouterDType::kAuto;
  DeviceChoice device = DeviceChoice::kAuto;

  Device choose_device(Runtime& runtime) const;  // with a remark where it is slow in that precision
  RankModel::Options model_options() const;      // of one that is not trained
};
void add_compute_options(CLI::App& command, ComputeOptions& options);

// The positional one: a text, or several. `more`: what else a command takes for a model.
template <class Texts>
void add_model(CLI::App& command, Texts& models, const std::string& more = "") {
  as_path(command.add_option("model", models, "Hugging Face directory, checkpoint or run directory" + more)
              ->required());
}

}  // namespace upmoe
