#pragma once
// The indexed data set of Megatron-LM: PREFIX.bin, the tokens alone, and PREFIX.idx, which says where they are. All
// numbers are little-endian; what follows the header has no alignment:
//
//   bytes   .idx
//   0       "MMIDIDX\0\0"
//   9       uint64   version, 1
//   17      uint8    type of a token: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
//   18      uint64   S sequences
//   26      uint64   D document boundaries, one more than documents
//   34      int32[S] tokens of each sequence
//           int64[S] where each begins in .bin, in bytes
//           int64[D] the sequence that each document begins with; the first 0, the last S
//
// Every integer type is read. uint32 has no number in Megatron-LM itself, which writes int32 where 16 bits do not do;
// 9, which fairseq gave it, is read as well. There are no checksums and no word of a vocabulary or a tokenizer.

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "data/posix_file.h"
#include "data/token_file.h"

namespace upmoe {

struct MegatronTokenType;
class MegatronIndex;

// document_ends() has the documents with tokens: a document without any ends where the one before it does.
class MegatronTokenFile final : public TokenFile {
 public:
  explicit MegatronTokenFile(const std::filesystem::path& path);  // PREFIX.bin or PREFIX.idx
  static bool takes(const std::filesystem::path& path);
  const char* format() const override { return "Megatron-LM indexed data set"; }
  bool checksummed() const override { return false; }
  std::string identity() const override { return identity_; }  // size of .bin, size and digest of .idx
  void read(std::int64_t first, std::span<std::uint32_t> tokens) const override;
  bool has_loss_mask() const override { return false; }
  void read_loss_mask(std::int64_t first, std::span<std::uint8_t> mask) const override;

 private:
  std::vector<std::int64_t> read_sequences(MegatronIndex& index, std::int64_t count);
  void read_documents(MegatronIndex& index, std::int64_t count, const std::vector<std::int64_t>& begins);

  PosixFile tokens_;
  PosixFile::Stamp opened_;
  const MegatronTokenType* type_ = nullptr;
  std::string identity_;
};

}  // namespace upmoe
