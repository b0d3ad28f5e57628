#include "trainer/diagnosis/run_inputs.h"

#include <filesystem>

#include "configs/nearest_meshes.h"
#include "configs/trained_model.h"
#include "data/checkpoint_folder.h"
#include "data/model_source.h"
#include "trainer/held_out.h"
#include "trainer/session.h"
#include "trainer/teacher.h"

namespace upmoe {

namespace {

namespace fs = std::filesystem;

// A run that goes on has its model in its checkpoints.
ModelConfig model_of(const RunConfig& run) {
  if (!checkpoint_folders(fs::path(run.run.dir) / "checkpoints").empty())
    return open_model(run.run.dir)->config();
  if (run.model.init == ModelInit::kRandom) return read_model_config(run.model.path);
  return open_model(run.model.path)->config();
}

}  // namespace

void require_inputs(RunConfig run, int ranks) {
  const ModelConfig model = trained_model(run, model_of(run));
  if (run.train.teacher.given()) open_model(run.train.teacher.model);
  read_teacher(run);
  require_possible(run, model, ranks);
  open_training_data(run, model.vocab_size);
  open_held_out(run.data, model.vocab_size);
}

}  // namespace upmoe
