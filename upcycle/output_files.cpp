#include "upcycle/output_files.h"

#include "data/hf_writer.h"
#include "data/posix_file.h"

namespace upmoe {

namespace fs = std::filesystem;

void make_output_files(const fs::path& folder, const HfLayout& layout) {
  // Of full length from the beginning: ranks write their parts at their places, in any order.
  for (const HfLayout::File& file : layout.files) PosixFile::create(folder / file.name).resize(file.bytes);
}

void check_output_files(const fs::path& folder, const HfLayout& layout) {
  for (const HfLayout::File& file : layout.files) {
    const std::uint64_t found = PosixFile::open_read(folder / file.name).size();
    if (found != file.bytes) {
      fail(ExitCode::kFailure, "{}: {} bytes, expected {}", (folder / file.name).string(), found, file.bytes);
    }
  }
}

OutputFiles::OutputFiles(const fs::path& folder, const HfLayout& layout) {
  for (const HfLayout::File& file : layout.files) files_.emplace_back(folder / file.name);
}

void OutputFiles::write(std::size_t file, std::uint64_t offset, std::span<const std::byte> bytes) {
  files_.at(file).write(offset, bytes);
}

void OutputFiles::sync() {
  for (DirectFile& f : files_) f.sync();
}

}  // namespace upmoe
