#include "trainer/checkpoint_keeper.h"

#include <sys/stat.h>

#include <algorithm>

#include "data/checkpoint_folder.h"
#include "data/folder.h"
#include "data/posix_file.h"
#include "data/shard_store.h"
#include "data/store_writer.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::size_t kFewest = 2;  // usable ones; fewer are never left behind to keep the rule of `keep`

// A save that was cut off, or a removal.
bool has_leftover_name(const fs::path& path) {
  const std::string extension = path.extension().string();
  return (extension == ".tmp" || extension == ".old") && step_of(path.stem().string());
}

bool has_size(const fs::path& file, std::uint64_t bytes) {
  struct stat info {};
  return stat(file.c_str(), &info) == 0 && S_ISREG(info.st_mode) &&
         static_cast<std::uint64_t>(info.st_size) == bytes;
}

std::uint64_t bytes_of_values(const ShardStore& store) {
  std::uint64_t bytes = 0;
  for (const auto& [key, tensor] : store.tensors())
    bytes += static_cast<std::uint64_t>(tensor.shape.elements()) * size_of(tensor.dtype);
  return bytes;
}

}  // namespace

CheckpointKeeper::CheckpointKeeper(fs::path checkpoints_dir, int keep, std::int64_t keep_every)
    : dir_(std::move(checkpoints_dir)), keep_(static_cast<std::size_t>(keep)), keep_every_(keep_every) {}

void CheckpointKeeper::clear_leftovers() const {
  try {
    for (const fs::path& entry : entries_of(dir_)) {
      if (!has_leftover_name(entry) || !is_leftover(entry)) continue;
      if (remove_store(entry)) {
        log::info("{}: left over from a save that was cut off, removed", entry.string());
      } else {
        log::warning("{}: left over from a save that was cut off; what is not of this program stays",
                     entry.string());
      }
    }
  } catch (const SystemError& e) {
    log::warning("leftovers of saves that were cut off are not removed: {}", e.what());
  }
}

void CheckpointKeeper::remember(const CheckpointChoice& choice) {
  for (const PassedOver& p : choice.passed_over) {
    std::string place = "it stays where it is";
    passed_over_[*step_of(p.folder.filename().string())] = p.fault.reason;
    try {
      if (p.fault.damaged) place = "set aside as " + set_aside(p.folder).filename().string();
    } catch (const SystemError& e) {
      place = e.what();
    }
    log::warning("{}; {}", p.words(), place);
  }
  if (choice.newest) good_.push_back(*step_of(choice.newest->filename().string()));
}

void CheckpointKeeper::make_way(std::int64_t step) {
  const fs::path target = checkpoint_path(dir_, step);
  if (!path_exists(target)) return;
  std::string reason = "it is not of this run";
  if (const auto known = passed_over_.find(step); known != passed_over_.end()) {
    reason = known->second;
  } else if (!is_real_folder(target)) {
    reason = "it is no folder";
  } else if (const auto fault = structural_fault(target)) {
    reason = fault->reason;
  }
  const fs::path to = set_aside(target);
  log::warning("{} stands where the checkpoint of step {} goes, set aside as {}: {}", target.string(), step,
               to.filename().string(), reason);
}

// By presence and sizes, which a damaged one may have too: what is read to the last byte is in good_.
bool CheckpointKeeper::is_usable(std::int64_t step, const fs::path& folder) {
  if (passed_over_.contains(step)) return false;
  if (const auto known = known_.find(step); known != known_.end()) {
    const std::vector<StoredFile>& files = known->second.files;
    return path_exists(folder / "manifest.json") &&
           std::all_of(files.begin(), files.end(),
                       [&](const StoredFile& f) { return has_size(folder / f.name, f.bytes); });
  }
  if (!is_real_folder(folder)) return false;  // a link: what it leads to is another's
  return !fault_of([&] {
    const ShardStore store(folder);
    const std::uint64_t all = bytes_in(folder), values = bytes_of_values(store);
    known_[step] = {store.manifest().files, all - std::min(all, values)};
  });
}

std::vector<CheckpointKeeper::Usable> CheckpointKeeper::usable() {
  std::vector<Usable> all;
  for (const fs::path& folder : checkpoint_folders(dir_)) {
    const std::int64_t step = *step_of(folder.filename().string());
    if (is_usable(step, folder)) all.push_back({step, folder});
  }
  return all;
}

// Those that the rule of `keep` is about: a milestone counts while it is one of the newest.
std::vector<CheckpointKeeper::Usable> CheckpointKeeper::without_old_milestones(std::vector<Usable> all,
                                                                               std::size_t newest) const {
  const auto old = all.end() - static_cast<std::ptrdiff_t>(std::min(newest, all.size()));
  all.erase(std::remove_if(all.begin(), old, [&](const Usable& u) { return is_milestone(u); }), old);
  return all;
}

bool CheckpointKeeper::is_one_of_last_good(std::int64_t step, std::size_t count) const {
  const std::size_t first = good_.size() - std::min(count, good_.size());
  return std::find(good_.begin() + static_cast<std::ptrdiff_t>(first), good_.end(), step) != good_.end();
}

// Of five usable ones, the newest on the right, with keep 3 and one more about to be written:
//
//   10   20   30   40   50      5 + 1 - keep: the oldest three may go, as long as two are left
//                  good good    and the two that are known to be good may not, wherever they stand
std::vector<CheckpointKeeper::Usable> CheckpointKeeper::that_may_go(bool last) {
  std::vector<Usable> all = usable();
  std::erase_if(good_, [&](std::int64_t step) {  // gone by another's hand, or cut short
    return std::none_of(all.begin(), all.end(), [&](const Usable& u) { return u.step == step; });
  });
  if (good_.empty() && !all.empty()) good_.push_back(all.back().step);  // the best guess there is
  all = without_old_milestones(std::move(all), keep_ - 1);
  std::size_t count = 0;
  if (last) {
    count = all.size();
  } else if (all.size() + 1 > keep_ && all.size() > kFewest) {
    count = std::min(all.size() + 1 - keep_, all.size() - kFewest);
  }
  std::erase_if(all, [&](const Usable& u) {
    return is_milestone(u) || is_one_of_last_good(u.step, last ? 1 : kFewest);
  });
  all.resize(std::min(count, all.size()));
  return all;
}

// Renamed first, so that a folder that is being deleted is never taken for a checkpoint. Nor after a power cut:
// some file systems give the blocks of a deleted file away before they have written down a rename.
void CheckpointKeeper::remove(const Usable& checkpoint) {
  fs::path doomed = checkpoint.folder;
  doomed += ".old";
  move_path(checkpoint.folder, doomed);
  known_.erase(checkpoint.step);
  sync_path(dir_);
  if (!remove_store(doomed))
    log::warning("{}: retired; it holds files that are not of this program, which stay", doomed.string());
}

void CheckpointKeeper::make_room(std::uint64_t bytes, bool last) {
  const std::uint64_t free = free_bytes_at(dir_);
  std::uint64_t needed = StoreWriter::space_for(bytes), gained = 0;
  try {
    if (const auto all = usable(); !all.empty())  // index and manifest are not in `bytes`
      needed = std::max(needed, bytes + StoreWriter::space_for(known_.at(all.back().step).overhead));
  } catch (const SystemError& e) {
    log::warning("older checkpoints cannot be looked at: {}", e.what());
  }
  if (free >= needed) return;
  const std::vector<Usable> doomed = that_may_go(last);
  std::vector<std::uint64_t> sizes;
  for (const Usable& u : doomed) sizes.push_back(bytes_in(u.folder));
  std::size_t count = 0;
  while (count < sizes.size() && free + gained < needed) gained += sizes[count++];
  if (free + gained < needed)
    fail(ExitCode::kBadInput, "{}: the checkpoint needs {} bytes, {} are free; {}", dir_.string(), needed,
         free, advice(needed - free));
  for (std::size_t i = 0; i < count; ++i) {
    remove(doomed[i]);
    log::warning("checkpoint {} is removed {}: the disk has no room for another one beside it",
                 doomed[i].folder.string(),
                 last ? "for the last one of this run" : "before the next one is written");
  }
}

// The largest `keep` that would make enough room, or what else would.
std::string CheckpointKeeper::advice(std::uint64_t missing) {
  const std::vector<Usable> all = without_old_milestones(usable(), kFewest);
  std::uint64_t gained = 0;
  for (std::size_t count = 0; count + kFewest < all.size(); ++count) {
    gained += bytes_in(all[count].folder);
    if (gained >= missing) return fmt::format("set checkpoint.keep={}, or make room", all.size() - count);
  }
  std::string text = fmt::format("make room for {} more (checkpoint.keep=N needs room for N+1)", missing);
  if (keep_every_ > 0)
    text += fmt::format("; those of steps that checkpoint.keep_every = {} divides stay until you remove them",
                        keep_every_);
  for (const fs::path& aside : aside_folders(dir_))
    text += fmt::format("; {} was set aside and may be removed", aside.filename().string());
  return text;
}

bool CheckpointKeeper::retire_oldest(bool last) {
  try {
    const std::vector<Usable> doomed = that_may_go(last);
    if (doomed.empty()) return false;
    remove(doomed.front());
    log::warning("checkpoint {} is removed so that the next save finds room", doomed.front().folder.string());
    return true;
  } catch (const Error& e) {
    log::warning("no older checkpoint can be removed: {}", e.what());
    return false;
  }
}

void CheckpointKeeper::wrote(std::int64_t step, bool durable) {
  // What had this name before was set aside: whatever was known of it is no longer true.
  passed_over_.erase(step);
  known_.erase(step);
  std::erase(good_, step);
  good_.push_back(step);
  // A power cut may still take the new one's name away: the older ones are what is left then.
  if (!durable) return;
  try {
    const std::vector<Usable> all = without_old_milestones(usable(), keep_);
    std::size_t left = all.size();
    for (const Usable& u : all) {
      if (left <= keep_) break;
      if (is_milestone(u) || is_one_of_last_good(u.step, kFewest)) continue;
      remove(u);
      --left;
    }
  } catch (const Error& e) {
    log::warning("older checkpoints are not removed: {}", e.what());
  }
}

}  // namespace upmoe
