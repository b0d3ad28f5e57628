#include "trainer/diagnosis/run_inputs.h"

#include <filesystem>
#include <optional>

#include "configs/nearest_meshes.h"
#include "data/model_source.h"
#include "data/run_metadata.h"
#include "data/shard_store.h"
#include "trainer/checkpoint_choice.h"
#include "trainer/freeze.h"
#include "trainer/held_out.h"
#include "trainer/optimizer_groups.h"
#include "trainer/resumption.h"
#include "trainer/session.h"
#include "trainer/teacher.h"

namespace upmoe {

namespace fs = std::filesystem;

StartingPoint starting_point_of(const RunConfig& run, Communicator& world) {
  const CheckpointChoice choice = choose_checkpoint(fs::path(run.run.dir) / "checkpoints", world);
  StartingPoint start{choice.newest, {}};
  if (world.rank() != 0) return start;
  for (const PassedOver& p : choice.passed_over)
    start.passed_over.push_back(
        {Severity::kWarning, ExitCode::kDone,
         fmt::format("{}; {}", p.words(), p.fault.damaged ? "a run sets it aside" : "it stays where it is")});
  return start;
}

ReadInputs require_inputs(RunConfig run, const std::optional<fs::path>& checkpoint, int ranks, bool first) {
  RunMetadata record;
  std::string data_changes;
  if (checkpoint) {
    record = run_metadata_of(ShardStore(*checkpoint));
    if (first) data_changes = Resumption(*checkpoint, run).changes_of("data");
  }
  const StartModel start = open_start(run, checkpoint);
  const ModelConfig& model = start.config;
  std::unique_ptr<ModelSource> teacher;
  if (run.train.teacher.given()) teacher = open_model(run.train.teacher.model);
  read_teacher(run);
  require_possible(run, model, ranks);
  // Of patterns that catch nothing.
  optimizer_groups(run.optimizer.groups, model, frozen_names(run.freeze, model));
  if (checkpoint) require_whole_steps(run, record.step, record.samples);
  const std::unique_ptr<TokenDataset> data = open_training_data(run, model.vocab_size);
  if (checkpoint) require_same_data(run, *data, *checkpoint, record.data_fingerprint, data_changes);
  return {models_in_lines(model, start.source.get(), teacher.get()), "", data_in_lines(*data),
          fingerprint_of(open_held_out(run.data, model.vocab_size))};
}

}  // namespace upmoe
