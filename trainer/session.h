#pragma once
// Everything one rank needs to train, built from a configuration: memory, mesh, parameters, model, data. Owns
// all of it; the parts refer to each other, so a session stays where it was made.

#include <memory>

#include "configs/run_config.h"
#include "data/batch_loader.h"
#include "parallel/mesh.h"
#include "parallel/stage_plan.h"
#include "trainer/grad_reducer.h"
#include "trainer/model/transformer.h"
#include "trainer/optimizer.h"
#include "trainer/pipeline.h"

namespace upmoe {

MeshSpec mesh_of(const RunConfig& run, int world_size);
// Blocks to stages by the cost that the ledger books for one sequence on the dry device.
StagePlan stages_of(const RunConfig& run, const ModelConfig& model);

// A line for the start of a run whose precision takes longer than fp32 on this device; nothing otherwise.
void remark_on_precision(Precision precision, Device device);

// Device, scratch memory and ledger of one rank.
struct RankMemory {
  // On a GPU: the calling thread's. `world`, if given, outlives this; on the CPU its stream moves transfers on.
  explicit RankMemory(Device device, Communicator* world = nullptr);
  Ledger ledger;
  Arena scratch;
  std::unique_ptr<Stream> stream;
  Exec exec;
};

struct Session {
  // Collective. Weights are neither loaded nor initialised yet. `first_sample`: where the data order goes on.
  Session(const RunConfig& run, const ModelConfig& model, Communicator& world, Device device = {});
  Session(const Session&) = delete;

  void open_data(std::int64_t first_sample);

  RunConfig run;
  ModelConfig config;
  RankMemory memory;
  ProcessMesh mesh;
  StagePlan plan;
  ParamStore params;
  std::vector<Transformer> chunks;
  Pipeline pipeline;
  GradReducer reducer;
  Optimizer optimizer;
  std::unique_ptr<TokenDataset> data;
  std::unique_ptr<BatchSource> batches;
};

}  // namespace upmoe
