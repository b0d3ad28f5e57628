#pragma once
// A model on one rank, ready for micro-batches: memory, mesh, parameters, layers, pipeline. Training, evaluation and
// rehearsals all begin with one.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "parallel/mesh.h"
#include "parallel/stage_plan.h"
#include "trainer/model/transformer.h"
#include "trainer/pipeline.h"

namespace upmoe {

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

// The parts refer to each other, so a model stays where it was made.
struct RankModel {
  struct Options {
    DType dtype = DType::kF32;       // of values and activations
    DType grad_dtype = DType::kF32;  // dtype, or fp32 beside bf16 values
    std::vector<Role> fp32 = {};     // kept in fp32 whatever dtype is
    bool gradients = true;
    bool share_block_grads = false;  // ZeRO-2
    Recompute recompute = Recompute::kNone;
    std::vector<std::string> freeze = {};  // names of parameters that do not train
    std::optional<StagePlan> plan = {};    // of as many stages as the mesh has; one stage needs none
    int node_ranks = 0;                    // as in ProcessMesh
  };
  // Collective. Weights are neither loaded nor initialised yet. `world` outlives the model.
  RankModel(const ModelConfig& config, const MeshSpec& spec, Communicator& world, Device device,
            const Options& options);
  RankModel(const RankModel&) = delete;

  ModelConfig config;
  RankMemory memory;
  ProcessMesh mesh;
  StagePlan plan;
  ParamStore params;
  std::vector<Transformer> chunks;
  Pipeline pipeline;
};

}  // namespace upmoe
