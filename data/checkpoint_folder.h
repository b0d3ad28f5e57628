#pragma once
// Folders of checkpoints by their names, and what of them is this program's own.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace upmoe {

// step_00000100: at least eight digits, no more zeros in front than they need. Every name has one step and
// every step one name; any other name is no checkpoint's.
std::string checkpoint_name(std::int64_t step);
std::optional<std::int64_t> step_of(std::string_view name);
std::filesystem::path checkpoint_path(const std::filesystem::path& checkpoints_dir, std::int64_t step);
// Every folder of such a name, whatever it holds; newest last.
std::vector<std::filesystem::path> checkpoint_folders(const std::filesystem::path& checkpoints_dir);

// Renames what has no business under its name to NAME.aside, or NAME.aside-2 ... where that is taken; returns
// the new path.
std::filesystem::path set_aside(const std::filesystem::path& path);
// What was set aside under a checkpoint's name.
std::vector<std::filesystem::path> aside_folders(const std::filesystem::path& checkpoints_dir);

// Why a store cannot be used. `damaged`: its content is wrong or missing; else the system does not let it be
// read (permissions, a failing disk, links in a circle), and what it holds is unknown.
struct StoreFault {
  bool damaged = false;
  std::string reason;
};
// Runs `look`, which opens or reads a store. What says nothing about the store (no memory, too many open
// files, the format of a newer program) is thrown on.
std::optional<StoreFault> fault_of(const std::function<void()>& look);
// The same for opening it: manifest, presence and sizes of its files; no contents are read.
std::optional<StoreFault> structural_fault(const std::filesystem::path& store);

bool is_run_directory(const std::filesystem::path& path);
// For reading, a run directory stands for its newest checkpoint: those that cannot be opened are passed over with
// a warning. Throws Error(kBadInput) when there is none. Any other path stands for itself.
std::filesystem::path newest_if_run(const std::filesystem::path& path);

// Removes a folder that a store lies in, or part of one: files of the names that a store writer gives, then
// the folder. False when something else lies there, which stays.
bool remove_store(const std::filesystem::path& folder);
// Whether a folder holds nothing, or something of those names: a writer or a removal that was cut off.
bool is_leftover(const std::filesystem::path& folder);

}  // namespace upmoe
