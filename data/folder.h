#pragma once
// Names in a file system, and its room: what std::filesystem does, with errors that say what to do. What the
// system refuses is a SystemError.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <vector>

#include "kernels/core/system_error.h"

namespace upmoe {

bool path_exists(const std::filesystem::path& path);     // a link counts as itself, wherever it leads
bool is_real_folder(const std::filesystem::path& path);  // a folder, and no link to one; false when absent
void make_folder(const std::filesystem::path& path);     // must not exist
void make_folders(const std::filesystem::path& path);    // with those above it; existing ones are fine
// Whether it is a blob of the Hugging Face cache, MODEL/blobs, to which `folder`, MODEL/snapshots/REVISION, has links.
bool is_blob_of(const std::filesystem::path& file, const std::filesystem::path& folder);
// Never replaces anything: fails when `to` exists.
void move_path(const std::filesystem::path& from, const std::filesystem::path& to);
void remove_file(const std::filesystem::path& path);
void remove_empty_folder(const std::filesystem::path& path);
// Full paths, ordered by name. None when the folder does not exist.
std::vector<std::filesystem::path> entries_of(const std::filesystem::path& folder);
std::uint64_t bytes_in(const std::filesystem::path& folder);  // of the regular files right in it

std::filesystem::path nearest_existing(std::filesystem::path path);  // itself, or the first one above that is
using FreeSpace = std::function<std::uint64_t(const std::filesystem::path&)>;
// For this user, where `path` lies, which need not exist yet.
std::uint64_t free_bytes_at(const std::filesystem::path& path);
// Throws Error(kBadInput) with both figures.
void require_free_space(const std::filesystem::path& path, std::uint64_t bytes,
                        const FreeSpace& free_space = free_bytes_at);

}  // namespace upmoe
