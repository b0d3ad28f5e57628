#pragma once
// The model whose logits a run's model learns from beside its data: weights alone, in the mesh of the run, forward
// alone. What its head reads is computed before the model's own forward of the same micro-batch and kept until its loss
// (Pipeline); logits exist for a chunk of rows of both models at a time (LmHead). Its FLOPs are booked apart
// (Books::kTeacher).

#include <vector>

#include "configs/run_config.h"
#include "data/model_source.h"
#include "trainer/model/param_store.h"
#include "trainer/model/transformer.h"

namespace upmoe {

// Reads the configuration of the teacher that the run names, where it names one, into the run; no weights.
void read_teacher(RunConfig& run);

// The run's mesh for its teacher, which has read_teacher() or the like behind it: the same places along dp, cp and tp.
MeshSpec mesh_of_teacher(const RunConfig& run, int world_size);

class Teacher {
 public:
  // Collective. Of a run with a teacher, whose configuration was read. No weights are loaded yet. `world` outlives it.
  Teacher(const RunConfig& run, Communicator& world, Device device);
  Teacher(const Teacher&) = delete;

  void load(Exec& ex, const ReadParam& read) { params_.load(ex, read); }
  void load(Exec& ex, const ModelSource& source);

  const Transformer& model() const { return chunks_.front(); }
  const ModelConfig& config() const { return config_; }
  std::size_t bytes() const { return params_.value_bytes(); }

 private:
  ModelConfig config_;
  ProcessMesh mesh_;
  ParamStore params_;
  std::vector<Transformer> chunks_;  // one
};

}  // namespace upmoe
