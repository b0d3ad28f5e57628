#include "trainer/checkpoint_choice.h"

#include <memory>

#include "data/folder.h"
#include "data/store_check.h"
#include "parallel/host.h"
#include "parallel/texts.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

// Between two turns the ranks meet, so that one with a slow disk is not taken for one that hangs.
constexpr std::chrono::milliseconds kTurn{250};

// The fault of the lowest rank that met one, on every rank.
std::optional<StoreFault> agreed_fault(Communicator& world, const std::optional<StoreFault>& mine) {
  std::int64_t speaker = mine ? world.rank() : world.size();
  world.all_reduce(host_view(&speaker, {1}), ReduceOp::kMin);
  if (speaker == world.size()) return std::nullopt;
  const int root = static_cast<int>(speaker);
  std::int64_t damaged = mine && mine->damaged ? 1 : 0;
  world.broadcast(host_view(&damaged, {1}), root);
  return StoreFault{damaged == 1, broadcast_text(world, mine ? mine->reason : "", root)};
}

void require_visible(const fs::path& folder, const Communicator& world) {
  if (world.rank() == 0 || path_exists(folder)) return;
  fail(ExitCode::kBadInput,
       "{}: rank 0 has it, rank {} on host {} does not; "
       "run.dir must lie on a file system that all hosts share",
       folder.string(), world.rank(), host_name());
}

// Each rank reads its share of the files, all of them until one finds a fault or the last has finished.
std::optional<StoreFault> find_fault(const fs::path& folder, Communicator& world) {
  std::unique_ptr<ShardStore> store;
  std::optional<StoreFault> fault;
  run_agreed(world, [&] {
    require_visible(folder, world);
    fault = fault_of([&] { store = std::make_unique<ShardStore>(folder); });
  });
  if (const auto agreed = agreed_fault(world, fault)) return agreed;
  StoreCheck check(*store, world.rank(), world.size());
  for (std::int64_t more = 1; more == 1;) {
    run_agreed(world, [&] { fault = fault_of([&] { more = check.advance(kTurn) ? 1 : 0; }); });
    if (const auto agreed = agreed_fault(world, fault)) return agreed;
    world.all_reduce(host_view(&more, {1}), ReduceOp::kMax);
  }
  return std::nullopt;
}

// Steps of the folders there, newest first, as rank 0 sees them.
std::vector<std::int64_t> steps_of(const fs::path& checkpoints_dir, Communicator& world) {
  std::vector<std::int64_t> steps;
  run_agreed(world, [&] {
    if (world.rank() != 0) return;
    for (const fs::path& folder : checkpoint_folders(checkpoints_dir))
      steps.insert(steps.begin(), *step_of(folder.filename().string()));
  });
  auto count = static_cast<std::int64_t>(steps.size());
  world.broadcast(host_view(&count, {1}), 0);
  steps.resize(static_cast<std::size_t>(count));
  if (count > 0) world.broadcast(host_view(steps.data(), {count}), 0);
  return steps;
}

}  // namespace

std::string PassedOver::words() const {
  return fmt::format("checkpoint {} is not usable and is passed over: {}", folder.string(), fault.reason);
}

CheckpointChoice choose_checkpoint(const fs::path& checkpoints_dir, Communicator& world) {
  CheckpointChoice choice;
  for (const std::int64_t step : steps_of(checkpoints_dir, world)) {
    const fs::path folder = checkpoint_path(checkpoints_dir, step);
    const std::optional<StoreFault> fault = find_fault(folder, world);
    if (!fault) {
      choice.newest = folder;
      return choice;
    }
    choice.passed_over.push_back({folder, *fault});
  }
  run_agreed(world, [&] {
    if (world.rank() != 0) return;
    std::string all;
    for (const PassedOver& p : choice.passed_over)
      all += fmt::format("\n  {}: {}", p.folder.filename().string(), p.fault.reason);
    for (const fs::path& entry : aside_folders(checkpoints_dir))
      all += fmt::format("\n  {}: set aside by an earlier start", entry.filename().string());
    if (!all.empty())
      fail(ExitCode::kBadInput,
           "{}: there are checkpoints, but none can be used:{}\nmend one of them; or, to start over from "
           "step 0, choose another run.dir or move that folder away",
           checkpoints_dir.string(), all);
  });
  return choice;
}

}  // namespace upmoe
