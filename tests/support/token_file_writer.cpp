#include "tests/support/token_file_writer.h"

#include <hdf5.h>

#include "data/partial_folder.h"
#include "data/token_file_format.h"
#include "kernels/core/check.h"

namespace upmoe {
namespace {

// A refusal of the library at any step leaves no file behind that could be taken for a complete one.
template <class T>
T checked(T result, const std::filesystem::path& path, const char* step) {
  if (result < 0) fail(ExitCode::kBadInput, "{}: {} failed; is the disk full?", path.string(), step);
  return result;
}

class Writer {
 public:
  explicit Writer(const std::filesystem::path& path) : path_(path) {
    file_ =
        checked(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT), path, "creating the file");
  }
  ~Writer() {
    if (file_ >= 0) H5Fclose(file_);
  }
  Writer(const Writer&) = delete;

  void dataset(const char* name, hid_t type, std::size_t length, const void* values) {
    const hsize_t dims = length;
    const hid_t space = checked(H5Screate_simple(1, &dims, nullptr), path_, "describing a dataset");
    const hid_t set = H5Dcreate2(file_, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    H5Sclose(space);
    checked(set, path_, "creating a dataset");
    const herr_t written = H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values);
    H5Dclose(set);
    checked(written, path_, "writing a dataset");
  }
  void integer(const char* name, std::int64_t value) { attribute(name, H5T_STD_I64LE, &value); }
  void text(const char* name, const std::string& value) {
    const hid_t type = checked(H5Tcopy(H5T_C_S1), path_, "describing a text");
    H5Tset_size(type, value.size() + 1);
    attribute(name, type, value.c_str());
    H5Tclose(type);
  }
  void close() {
    const hid_t file = file_;
    file_ = -1;
    checked(H5Fclose(file), path_, "closing the file");
  }

 private:
  void attribute(const char* name, hid_t type, const void* value) {
    const hid_t space = checked(H5Screate(H5S_SCALAR), path_, "describing an attribute");
    const hid_t id = H5Acreate2(file_, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    H5Sclose(space);
    checked(id, path_, "creating an attribute");
    const herr_t written = H5Awrite(id, type, value);
    H5Aclose(id);
    checked(written, path_, "writing an attribute");
  }

  std::filesystem::path path_;
  hid_t file_ = -1;
};

}  // namespace

void write_token_file(const std::filesystem::path& path, std::span<const std::uint32_t> tokens,
                      std::vector<std::int64_t> document_ends, std::int64_t vocab_size, std::int64_t eos_id,
                      const std::string& tokenizer_sha256, std::span<const std::uint8_t> loss_mask) {
  if (document_ends.empty()) document_ends.push_back(static_cast<std::int64_t>(tokens.size()));
  const std::filesystem::path temporary = path.string() + ".tmp";
  Writer out(temporary);
  out.dataset("tokens", H5T_STD_U32LE, tokens.size(), tokens.data());
  out.dataset("document_ends", H5T_STD_I64LE, document_ends.size(), document_ends.data());
  out.text("format", kTokenFileFormat);
  out.integer("vocab_size", vocab_size);
  out.integer("eos_id", eos_id);
  out.text("tokenizer_sha256", tokenizer_sha256);
  const std::vector<std::uint32_t> chunks = checksums_of_chunks(tokens);
  out.dataset("checksums", H5T_STD_U32LE, chunks.size(), chunks.data());
  const std::vector<std::uint32_t> mask_chunks = checksums_of_chunks(loss_mask);
  if (!loss_mask.empty()) {
    out.dataset("loss_mask", H5T_STD_U8LE, loss_mask.size(), loss_mask.data());
    out.dataset("loss_mask_checksums", H5T_STD_U32LE, mask_chunks.size(), mask_chunks.data());
  }
  const TokenFileFacts facts{vocab_size, eos_id, tokenizer_sha256, static_cast<std::int64_t>(tokens.size()),
                             static_cast<std::int64_t>(document_ends.size())};
  out.integer("checksum", token_file_checksum(facts, document_ends, chunks, mask_chunks));
  out.close();
  give_name(temporary, path, Existing::kReplaced);
}

}  // namespace upmoe
