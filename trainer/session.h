#pragma once
// Everything one rank needs to train, built from a configuration: a model, and what updates it.

#include <filesystem>
#include <memory>
#include <optional>

#include "configs/run_config.h"
#include "data/batch_loader.h"
#include "data/model_source.h"
#include "trainer/grad_reducer.h"
#include "trainer/optimizer.h"
#include "trainer/rank_model.h"
#include "trainer/teacher.h"

namespace upmoe {

MeshSpec mesh_of(const RunConfig& run, int world_size);

// Bytes of one rank, each kind at its peak so far.
struct MemoryUse {
  std::size_t parameters = 0, gradients = 0;
  std::size_t optimizer = 0;    // moments and masters
  std::size_t activations = 0;  // of all micro-batches under way
  std::size_t scratch = 0;      // temporary memory of ops and layers
  std::size_t buckets = 0;      // through which gradients and weights travel
  std::size_t teacher = 0;      // its weights
  std::size_t total() const {
    return parameters + gradients + optimizer + activations + scratch + buckets + teacher;
  }
  friend bool operator==(const MemoryUse&, const MemoryUse&) = default;
};

// The model that a run begins with, or goes on with from a checkpoint of its own.
struct StartModel {
  std::unique_ptr<ModelSource> source;  // null for random weights: config.json alone is wanted then
  ModelConfig config;                   // as it is trained
};
// Reads no weights. Throws Error of a model that is not there or damaged, or that has other adapters, and of a
// checkpoint with another router, than the run asks for.
StartModel open_start(const RunConfig& run, const std::optional<std::filesystem::path>& checkpoint);
// The order of data.train. `vocab_size`: the model's.
std::unique_ptr<TokenDataset> open_training_data(const RunConfig& run, std::int64_t vocab_size);

struct Session : RankModel {
  // Collective. Weights are neither loaded nor initialised yet; the configuration of the run's teacher was read.
  Session(const RunConfig& run, const ModelConfig& model, Communicator& world, Device device = {});

  void open_data(std::int64_t first_sample);  // where the data order goes on
  MemoryUse memory_use() const;

  RunConfig run;
  GradReducer reducer;
  Optimizer optimizer;
  std::unique_ptr<Teacher> teacher;  // null: none
  std::unique_ptr<TokenDataset> data;
  std::unique_ptr<BatchSource> batches;
};

}  // namespace upmoe
