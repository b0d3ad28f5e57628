#pragma once
// A token file in HDF5, format upmoe-tokens-1. Its structure is read without the HDF5 library, which trusts what it
// reads (hdf5_structure.h); every size is compared with the file. Tokens are read by position, not mapped: a file that
// becomes shorter is an error with a name, not a signal.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "data/posix_file.h"
#include "data/token_file.h"
#include "data/token_file_format.h"

namespace upmoe {

class Hdf5TokenFile final : public TokenFile {
 public:
  explicit Hdf5TokenFile(const std::filesystem::path& path);
  static bool takes(const std::filesystem::path&) { return true; }  // whatever its name
  const char* format() const override { return kTokenFileFormat; }
  // Files of other programs have no checksums (token_file_format.h).
  bool checksummed() const override { return !tokens_.checksums.empty(); }
  std::string identity() const override;
  void read(std::int64_t first, std::span<std::uint32_t> tokens) const override;
  bool has_loss_mask() const override { return loss_mask_.bytes > 0; }
  void read_loss_mask(std::int64_t first, std::span<std::uint8_t> mask) const override;

 private:
  // A number for each token.
  struct Column {
    const char* what = "";                      // of it, for messages
    std::uint64_t at = 0, bytes = 0;            // offset in the file, and of one number; 0: not there
    std::vector<std::uint32_t> checksums = {};  // by chunk; empty: unknown
    mutable std::vector<char> verified = {};    // by chunk
  };
  void check_description();
  void check_document_ends() const;
  void check_unchanged() const;
  void check_chunk(const Column& column, std::size_t chunk) const;
  void read_column(const Column& column, std::int64_t first, std::span<std::byte> numbers) const;

  PosixFile file_;
  Column tokens_{.what = "tokens"}, loss_mask_{.what = "numbers of loss_mask"};
  std::int64_t checksum_ = 0;  // of the whole content; 0 without checksums
  mutable std::mutex mutex_;   // of the stamp, and of which chunks are verified
  mutable PosixFile::Stamp opened_;
};

}  // namespace upmoe
