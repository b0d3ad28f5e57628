#pragma once
// The tensor files of a model directory being written by several ranks.

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "data/direct_file.h"
#include "data/hf_model.h"
#include "data/hf_writer.h"

namespace upmoe {

// One rank makes them in an existing folder, each in its full length. Throws Error(kBadInput).
void make_output_files(const std::filesystem::path& folder, const HfLayout& layout);
// Throws Error(kFailure) when a file does not have its length.
void check_output_files(const std::filesystem::path& folder, const HfLayout& layout);

// Opened by every rank. write() is for one thread at a time.
class OutputFiles {
 public:
  OutputFiles(const std::filesystem::path& folder, const HfLayout& layout);
  void write(std::size_t file, std::uint64_t offset,
             std::span<const std::byte> bytes);  // offset in the whole file
  void sync();                                   // on disk when it returns

 private:
  std::vector<DirectFile> files_;
};

}  // namespace upmoe
