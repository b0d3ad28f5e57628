#pragma once
// A model to read from, whatever form it has on disk: a Hugging Face directory, a checkpoint, or a run
// directory (its newest checkpoint).

#include <filesystem>
#include <memory>

#include "configs/model_config.h"
#include "configs/param_table.h"
#include "parallel/layout.h"

namespace upmoe {

class ModelSource {
 public:
  virtual ~ModelSource() = default;
  virtual const ModelConfig& config() const = 0;
  // Any box of a parameter, converted to out's dtype (fp32 or bf16): its best value where a checkpoint keeps
  // several.
  virtual void read(const ParamSpec& param, const Box& box, TensorView out) const = 0;
  virtual std::filesystem::path companions()
      const = 0;  // where tokenizer files lie; empty when that place is gone
};

// Throws Error(kBadInput) when `path` is none of the three, or damaged.
std::unique_ptr<ModelSource> open_model(const std::filesystem::path& path);

}  // namespace upmoe
