#pragma once
// Where a model directory lies when a folder near it was given.

#include <filesystem>
#include <string>

namespace upmoe {

// For messages about a place without config.json, where to look: "; a model lies in a folder of it: give DIR"
// when `given` is a root of the Hugging Face cache, or its parent, or the parent or a file of a model
// directory; what takes it when it is an adapter's folder, a file of one, or the checkpoints of a run; else empty.
// Never throws.
std::string model_folder_hint(const std::filesystem::path& given);

}  // namespace upmoe
