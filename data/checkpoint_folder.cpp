#include "data/checkpoint_folder.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

#include "data/companions.h"
#include "data/folder.h"
#include "data/manifest.h"
#include "data/shard_store.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kPrefix = "step_", kAside = ".aside", kCheckpoints = "checkpoints";

bool is_digits(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// A file that a store writer makes, or what upcycling lays beside it.
bool is_store_file(const std::string& name) {
  const std::string_view text = name;
  if (text.starts_with("shard_") && text.ends_with(".h5")) return is_digits(text.substr(6, text.size() - 9));
  return name == "manifest.json" || name == "index.h5" || name == "config.json" ||
         name == "upcycle_report.json" || is_companion(name);
}

}  // namespace

std::string checkpoint_name(std::int64_t step) {
  return fmt::format("{}{:08}", kPrefix, step);
}

std::optional<std::int64_t> step_of(std::string_view name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const std::string_view digits = name.substr(kPrefix.size());
  std::int64_t step = 0;
  if (!is_digits(digits) ||
      std::from_chars(digits.data(), digits.data() + digits.size(), step).ec != std::errc{} ||
      // Written back it has to be the same name: step_000000020 would be a second name of step 20.
      checkpoint_name(step) != name)
    return std::nullopt;
  return step;
}

fs::path checkpoint_path(const fs::path& checkpoints_dir, std::int64_t step) {
  return checkpoints_dir / checkpoint_name(step);
}

std::vector<fs::path> checkpoint_folders(const fs::path& checkpoints_dir) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  for (const fs::path& entry : entries_of(checkpoints_dir)) {
    const std::optional<std::int64_t> step = step_of(entry.filename().string());
    std::error_code unknown;  // a link in a circle leads to no folder
    if (step && fs::is_directory(entry, unknown)) found.emplace_back(*step, entry);
  }
  std::sort(found.begin(), found.end());
  std::vector<fs::path> paths;
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

fs::path set_aside(const fs::path& path) {
  for (int attempt = 1;; ++attempt) {
    fs::path to = path;
    to += attempt == 1 ? std::string(kAside) : fmt::format("{}-{}", kAside, attempt);
    try {
      move_path(path, to);
      return to;
    } catch (const SystemError& e) {
      if (e.number() != EEXIST) throw;
    }
  }
}

std::vector<fs::path> aside_folders(const fs::path& checkpoints_dir) {
  std::vector<fs::path> found;
  for (const fs::path& entry : entries_of(checkpoints_dir)) {
    const std::string name = entry.filename().string();
    const std::size_t end = name.find(kAside);
    if (end != std::string::npos && step_of(std::string_view(name).substr(0, end))) found.push_back(entry);
  }
  return found;
}

//   format of a newer program   thrown on: the store is good, and this program must not set it aside
//   of this process             thrown on: no memory or too many open files say nothing about the store
//   of the disk                 not usable; damaged only if a file is missing: one that cannot be read now may be later
//   bad contents                damaged
std::optional<StoreFault> fault_of(const std::function<void()>& look) {
  try {
    look();
    return std::nullopt;
  } catch (const FormatError&) {
    throw;
  } catch (const SystemError& e) {
    if (e.is_of_process()) throw;
    return StoreFault{e.is_missing(), e.what()};
  } catch (const Error& e) {
    if (e.code() != ExitCode::kBadInput) throw;
    return StoreFault{true, e.what()};
  }
}

std::optional<StoreFault> structural_fault(const fs::path& store) {
  return fault_of([&] { const ShardStore opened(store); });
}

bool is_run_directory(const fs::path& path) {
  return !fs::exists(path / "manifest.json") && fs::is_directory(path / kCheckpoints);
}

fs::path newest_if_run(const fs::path& path) {
  if (!is_run_directory(path)) return path;
  const std::vector<fs::path> all = checkpoint_folders(path / kCheckpoints);
  for (auto it = all.rbegin(); it != all.rend(); ++it) {
    const std::optional<StoreFault> fault = structural_fault(*it);
    if (!fault) return *it;
    log::warning("checkpoint {} is not usable and is passed over: {}", it->string(), fault->reason);
  }
  if (all.empty())
    fail(ExitCode::kBadInput, "{}: a run directory without a complete checkpoint", path.string());
  fail(ExitCode::kBadInput, "{}: none of its {} checkpoints can be used; see the warnings above",
       path.string(), all.size());
}

// Names decide, not contents: a folder may hold a user's notes, or a link to something large, and keeps them.
bool remove_store(const fs::path& folder) {
  bool only_ours = true;
  for (const fs::path& entry : entries_of(folder)) {
    if (is_store_file(entry.filename().string()) && !is_real_folder(entry)) {
      remove_file(entry);
    } else {
      only_ours = false;
    }
  }
  if (only_ours) remove_empty_folder(folder);
  return only_ours;
}

bool is_leftover(const fs::path& folder) {
  if (!is_real_folder(folder)) return false;
  const std::vector<fs::path> entries = entries_of(folder);
  return entries.empty() || std::any_of(entries.begin(), entries.end(), [](const fs::path& entry) {
           return is_store_file(entry.filename().string());
         });
}

}  // namespace upmoe
