#pragma once
// What a run takes of memory, time and links, rank by rank, from rehearsals of the ranks that differ.
//
// Ranks are alike where they stand at the same pipeline stage and hold parts of the same sizes: of experts (60 over 8
// ranks are 7 or 8 each), of heads, of the vocabulary. One of each kind is rehearsed, that with the most micro-batches.
// Where they stand among nodes is taken from that one. A step of many micro-batches is rehearsed with as many as have
// all under way that ever are, then with more, and what lies between is the same for every further one.

#include <array>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "trainer/memory_estimate.h"
#include "trainer/plan/step_clock.h"

namespace upmoe {

// Bytes, by what they are for.
struct MemoryPurposes {
  double weights = 0, gradients = 0, optimizer = 0, activations = 0;
  double communication = 0;  // buffers in which gradients and weights travel
  double workspace = 0;      // temporary memory of ops and layers
  double teacher = 0;        // its weights
  double tensors() const {
    return weights + gradients + optimizer + activations + communication + workspace + teacher;
  }
  double process = 0;     // driver, libraries, code: Machine::overhead_gb
  double checkpoint = 0;  // of the host: the copy that is written in the background
  static const std::array<std::pair<const char*, double MemoryPurposes::*>, 9> kAll;  // by their names
  // On the device. On a CPU the copy for a checkpoint is there as well.
  double total(bool with_checkpoint) const {
    return tensors() + process + (with_checkpoint ? checkpoint : 0);
  }
};

inline constexpr std::array<std::pair<const char*, double MemoryPurposes::*>, 9> MemoryPurposes::kAll{{
    {"weights", &MemoryPurposes::weights},
    {"gradients", &MemoryPurposes::gradients},
    {"optimizer", &MemoryPurposes::optimizer},
    {"activations", &MemoryPurposes::activations},
    {"communication", &MemoryPurposes::communication},
    {"workspace", &MemoryPurposes::workspace},
    {"process", &MemoryPurposes::process},
    {"checkpoint", &MemoryPurposes::checkpoint},
    {"teacher", &MemoryPurposes::teacher},
}};

struct PlannedRank {
  int rank = 0, stage = 0;
  int alike = 1;             // ranks, this one with them
  std::int64_t experts = 0;  // of a layer, that it holds; 0 where it has none
  MemoryPurposes memory;
  std::map<std::string, Cost, std::less<>> costs;  // of one step, by op and verb
  StepTime step, micro_batch;                      // a step; one more micro-batch
};

struct PlannedTime {
  double seconds = 0;  // of a step: the slowest rank's, and the pipeline's bubble
  // What they are made of, the slowest rank's.
  double compute = 0, calls = 0;  // calls: of compute, what calls take besides their work
  double exchange = 0, reduction = 0, stages = 0;
  double bubble = 0;                      // of the pipeline
  double imbalance = 0;                   // of `seconds`, how long the average rank waits for the slowest
  double tokens_per_s = 0;                // of all ranks
  double model_flops_per_s = 0, mfu = 0;  // of a rank
  // What takes the most of it: "compute", "calls", "exchange", "reduction", "bubble" or "imbalance".
  std::string limit() const;  // the largest of what is not computing, or "compute"
};

struct RunPlan {
  int world = 1;
  MeshSpec mesh;
  std::int64_t ranks_without_experts = 0;  // of ep's, that wait where the others compute theirs
  std::int64_t rounds = 0;                 // micro-batches of a rank
  double tokens = 0;                       // of a step
  double model_flops = 0;                  // of a step, all ranks
  double teacher_flops = 0;                // beside them: the forward of the model's teacher
  std::vector<PlannedRank> ranks;          // one of each kind
  std::optional<PlannedTime> time;
  double device_bytes = 0;  // of a rank's device; 0: no machine was named
  bool on_host = false;     // the device's memory is the host's

  const PlannedRank& fullest() const;
  const PlannedRank& slowest() const;
  double bytes_of(const PlannedRank& rank) const { return rank.memory.total(on_host); }
  MemoryPurposes mean_memory() const;
  bool fits() const { return device_bytes == 0 || bytes_of(fullest()) <= device_bytes; }
};

// One rank of each kind, and how many there are.
struct RankKind {
  int rank = 0, alike = 0;
};
std::vector<RankKind> kinds_of_ranks(const RunConfig& run, const ModelConfig& model, int world);

// Of a step, all ranks: the model's, and the forward of its teacher.
struct StepFlops {
  double model = 0, teacher = 0;
};

// What is wanted of a plan, and what is known already.
struct PlanScope {
  std::set<int> ranks;  // these alone, and what is said of all ranks is said of them; empty: one of each kind
  // Those of a run of the same model, batch, sequences, frozen parts and teacher; nothing: to be rehearsed.
  std::optional<StepFlops> flops = {};
};

// Without a machine, memory and bytes alone. Throws Error(kUsage) with every reason why the run is impossible for
// `world` ranks, and meshes near it that are not.
RunPlan plan_run(const RunConfig& run, const ModelConfig& model, int world,
                 const std::optional<Machine>& machine, const PlanScope& scope = {});

}  // namespace upmoe
