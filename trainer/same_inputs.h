#pragma once
// What each rank reads for itself, under names that all were given: where a host has files of its own, ranks would
// train replicas that are none, or wait for each other for ever. In lines, of which require_equal() tells the first
// that differs.

#include <string>

#include "data/model_source.h"
#include "data/token_dataset.h"
#include "parallel/communicator.h"

namespace upmoe {

struct ReadInputs {
  std::string models;          // folders and configurations, of model.path and the teacher
  std::string weights;         // digests of them; empty where nobody asks
  std::string data, held_out;  // files, and what is drawn from them
};

// `weights`, `teacher`: null where there are none; `config` is that of the run.
std::string models_in_lines(const ModelConfig& config, const ModelSource* weights,
                            const ModelSource* teacher);
std::string data_in_lines(const TokenDataset& data);

// Of a command that reads one model, `given` by a name, and its weights. As those below.
void require_same_model(Communicator& world, const std::string& given, const ModelSource& source);

// Throw Error(kUsage) on every rank, with words on rank 0. Collective.
void compare_models(Communicator& world, const ReadInputs& read);
void compare_data(Communicator& world, const ReadInputs& read);

}  // namespace upmoe
