#include "trainer/run_checkpoints.h"

#include "kernels/core/log.h"

namespace upmoe {

namespace {

// The rank that met it tells.
void warn_of_failure(std::int64_t step, bool last, const Error& e) {
  if (*e.what() == 0) return;
  log::warning("checkpoint of step {} failed{}: {}", step, last ? "" : ", training goes on", e.what());
}

}  // namespace

RunCheckpoints::RunCheckpoints(const std::filesystem::path& run_dir, const RunConfig::Checkpoint& rule,
                               Communicator& world)
    : dir_(run_dir / "checkpoints"),
      world_(world),
      writer_(dir_),
      keeper_(dir_, rule.keep, rule.keep_every) {}

void RunCheckpoints::take_over(RunLock* lock) {
  lock_ = lock;
  if (world_.rank() == 0) keeper_.clear_leftovers();
}

std::optional<std::filesystem::path> RunCheckpoints::choose() {
  const CheckpointChoice choice = choose_checkpoint(dir_, world_);
  if (world_.rank() == 0) keeper_.remember(choice);
  return choice.newest;
}

void RunCheckpoints::resumed(const std::filesystem::path& from, std::int64_t step) {
  if (from.filename() == checkpoint_name(step)) saved_step_ = step;  // else it was renamed
}

void RunCheckpoints::require_folder() {
  run_agreed(world_, [&] {
    if (lock_ != nullptr) lock_->require_held();
  });
}

void RunCheckpoints::begin(Session& session, const TrainState& state, bool in_background) {
  start(session, state, in_background, false);
}

void RunCheckpoints::start(Session& session, const TrainState& state, bool in_background, bool last) {
  if (busy()) finish();
  // A save that was asked for and due at one step is made once.
  if (saved_step_ == state.step) return;
  require_folder();
  auto bytes = static_cast<std::int64_t>(CheckpointWriter::bytes_of(session));
  world_.all_reduce(host_view(&bytes, {1}), ReduceOp::kSum);
  try {
    run_agreed(world_, [&] {
      if (world_.rank() != 0) return;
      keeper_.make_way(state.step);
      keeper_.make_room(static_cast<std::uint64_t>(bytes), last);
    });
    writer_.begin(session, state, world_, in_background);
    saved_step_ = state.step;
  } catch (const Error& e) {
    warn_of_failure(state.step, last, e);
  }
}

void RunCheckpoints::finish() {
  conclude(false);
}

void RunCheckpoints::conclude(bool last) {
  require_folder();
  try {
    const CheckpointWriter::Committed done = writer_.finish(world_);
    if (world_.rank() != 0) return;
    log::info("checkpoint {}", done.folder.string());
    keeper_.wrote(saved_step_, done.durable);
  } catch (const Error& e) {
    warn_of_failure(saved_step_, last, e);
    saved_step_ = -1;
    if (!last) retire_after_full_disk(false);
  }
}

// A quota, or a disk that others fill meanwhile: what the free space promised did not hold.
bool RunCheckpoints::retire_after_full_disk(bool last) {
  std::int64_t lacked = writer_.lacked_space() ? 1 : 0;
  world_.all_reduce(host_view(&lacked, {1}), ReduceOp::kMax);
  if (lacked == 0) return false;
  std::int64_t retired = world_.rank() == 0 && keeper_.retire_oldest(last) ? 1 : 0;
  world_.broadcast(host_view(&retired, {1}), 0);
  return retired == 1;
}

void RunCheckpoints::poll() {
  if (!busy()) return;
  std::int64_t written = writer_.written() ? 1 : 0;
  world_.all_reduce(host_view(&written, {1}), ReduceOp::kMin);
  if (written == 1) finish();
}

void RunCheckpoints::save_last(Session& session, const TrainState& state) {
  start(session, state, false, true);
  // Tried again as long as an older checkpoint can make room: without this one the run's last steps would be lost.
  while (busy()) {
    conclude(true);
    if (saved_step_ != state.step && retire_after_full_disk(true)) start(session, state, false, true);
  }
  if (saved_step_ != state.step)
    fail(ExitCode::kBadInput, "the checkpoint of step {} could not be written to {}; see the warning above",
         state.step, dir_.string());
}

}  // namespace upmoe
