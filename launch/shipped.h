#pragma once
// The folders of what the project ships and commands take by a short name, and models by it or by their place.

#include <memory>

#include "configs/shipped_file.h"
#include "data/model_source.h"

namespace upmoe {

extern const ShippedFolder kMachines, kModels;

// A model where its shape is enough: a configuration file, a directory with one, a checkpoint, a run directory, or a
// shipped name.
ModelConfig shape_of_model(const std::string& given);
// Its weights; null where there is a configuration and nothing that could be weights.
std::unique_ptr<ModelSource> weights_of_model(const std::string& given);
// For tables: the last part of its place.
std::string name_of_model(const std::string& given);

}  // namespace upmoe
