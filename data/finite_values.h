#pragma once
// Values that are not finite, found before a program computes with them.

#include <filesystem>

#include "data/hf_model.h"
#include "data/hf_writer.h"
#include "data/shard_store.h"

namespace upmoe {

// Read every value of a model, a slice at a time. Throw Error(kBadInput) that names the folder, the tensor and
// how many of its values are not finite.
void require_finite(const HfModel& model);
void require_finite(const ShardStore& store);  // its weights
// `read` that throws so where it gave such values; `folder`: what is read, for words.
ReadTensor finite_alone(ReadTensor read, const std::filesystem::path& folder);

}  // namespace upmoe
