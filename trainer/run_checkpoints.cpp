#include "trainer/run_checkpoints.h"

#include "kernels/core/log.h"

namespace upmoe {

RunCheckpoints::RunCheckpoints(const std::filesystem::path& run_dir, int keep, Communicator& world)
    : dir_(run_dir / "checkpoints"), world_(world), writer_(dir_, keep) {}

void RunCheckpoints::begin(Session& session, const TrainState& state, bool in_background) {
  if (busy()) finish();
  if (saved_step_ == state.step) return;
  try {
    writer_.begin(session, state, world_, in_background);
    saved_step_ = state.step;
  } catch (const Error& e) {
    if (world_.rank() == 0)
      log::warning("checkpoint of step {} failed, training goes on: {}", state.step, e.what());
  }
}

void RunCheckpoints::finish() {
  try {
    const std::filesystem::path path = writer_.finish(world_);
    if (world_.rank() == 0) log::info("checkpoint {}", path.string());
  } catch (const Error& e) {
    if (*e.what() != 0)
      log::warning("checkpoint of step {} failed, training goes on: {}", saved_step_, e.what());
    saved_step_ = -1;
  }
}

void RunCheckpoints::poll() {
  if (!busy()) return;
  std::int64_t written = writer_.written() ? 1 : 0;
  world_.all_reduce(host_view(&written, {1}), ReduceOp::kMin);
  if (written == 1) finish();
}

void RunCheckpoints::save_last(Session& session, const TrainState& state) {
  begin(session, state, false);
  if (busy()) finish();
  if (saved_step_ != state.step)
    fail(ExitCode::kBadInput, "the checkpoint of step {} could not be written to {}; see the warning above",
         state.step, dir_.string());
}

}  // namespace upmoe
