#pragma once
// A model to read from, whatever form it has on disk: a Hugging Face directory, a checkpoint, or a run
// directory (its newest checkpoint).

#include <filesystem>
#include <memory>
#include <string>

#include "configs/model_config.h"
#include "configs/param_table.h"
#include "parallel/layout.h"

namespace upmoe {

class ModelSource {
 public:
  virtual ~ModelSource() = default;
  virtual const ModelConfig& config() const = 0;
  // Any box of a parameter, converted to out's dtype (fp32 or bf16): its best value where a checkpoint keeps several.
  virtual void read(const ParamSpec& param, const Box& box, TensorView out) const = 0;
  // False: a buffer that what is read knows nothing of.
  virtual bool has(const ParamSpec& param) const = 0;
  // The folder that is read: the model directory, or the checkpoint of a run directory.
  virtual std::filesystem::path directory() const = 0;
  // Where tokenizer files lie; empty when that place is gone.
  virtual std::filesystem::path companions() const = 0;
};

// Throws Error(kBadInput) when `path` is none of the three, or damaged.
std::unique_ptr<ModelSource> open_model(const std::filesystem::path& path);
// Where no weights are wanted: of a configuration file, of a directory with a config.json, whose weights need not be
// there, or of what open_model() takes.
ModelConfig config_of_model(const std::filesystem::path& path);

// What a configuration says about the function, as JSON: without notes of other programs and the files' dtype.
std::string function_of(const ModelConfig& config);
// Of any run's: without the form of its routers and its adapters, which not every family has words for.
std::string function_without_routers(const ModelConfig& config);
// Tells whether two sources are one model, wherever it lies and however its files are cut: of the
// configuration and some values of every tensor and expert, read in fp32.
std::string digest_of(const ModelSource& source);

}  // namespace upmoe
