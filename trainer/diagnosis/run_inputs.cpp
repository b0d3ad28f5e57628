#include "trainer/diagnosis/run_inputs.h"

#include <filesystem>
#include <optional>

#include "configs/nearest_meshes.h"
#include "data/checkpoint_folder.h"
#include "data/model_source.h"
#include "trainer/held_out.h"
#include "trainer/session.h"
#include "trainer/teacher.h"

namespace upmoe {

namespace fs = std::filesystem;

void require_inputs(RunConfig run, int ranks) {
  std::optional<fs::path> checkpoint;
  if (!checkpoint_folders(fs::path(run.run.dir) / "checkpoints").empty())
    checkpoint = open_model(run.run.dir)->directory();
  const ModelConfig model = open_start(run, checkpoint).config;
  if (run.train.teacher.given()) open_model(run.train.teacher.model);
  read_teacher(run);
  require_possible(run, model, ranks);
  open_training_data(run, model.vocab_size);
  open_held_out(run.data, model.vocab_size);
}

}  // namespace upmoe
