#pragma once
// A model directory being written: DIR.tmp until it is complete, DIR afterwards.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "data/direct_file.h"
#include "data/hf_model.h"

namespace upmoe {

using FreeSpace = std::function<std::uint64_t(const std::filesystem::path&)>;  // bytes free where a path lies
std::uint64_t free_space_of(const std::filesystem::path& dir);

// Where things go, after the checks that can be made before anything is read or written. Throws Error(kUsage)
// when output and source overlap or the output exists and is not empty.
struct OutputPaths {
  std::filesystem::path dir, tmp;
};
OutputPaths plan_output(const std::filesystem::path& from, const std::filesystem::path& to);

// One rank does this before the first byte: removes what an earlier run left in tmp, makes the folder that
// the output will lie in, and checks that `bytes` are free there (Error(kBadInput) with both figures).
void make_room(const OutputPaths& paths, std::uint64_t bytes, const FreeSpace& free_space);

// make_room, then the directory and every tensor file in its full length, empty.
void create_output(const OutputPaths& paths, const HfLayout& layout, std::uint64_t bytes,
                   const FreeSpace& free_space);

// The tensor files, opened by every rank. write() is for one thread at a time.
class OutputFiles {
 public:
  OutputFiles(const std::filesystem::path& tmp, const HfLayout& layout);
  void write(std::size_t file, std::uint64_t offset,
             std::span<const std::byte> bytes);  // offset in the whole file
  void sync();                                   // on disk when it returns

 private:
  std::vector<DirectFile> files_;
};

// Tokenizer and generation files of the source, those there are.
void copy_companions(const std::filesystem::path& from, const std::filesystem::path& tmp);
// Checks that every file has its length, then renames tmp to dir, all of it fsynced.
void commit_output(const OutputPaths& paths, const HfLayout& layout);
void discard_output(const OutputPaths& paths) noexcept;

}  // namespace upmoe
