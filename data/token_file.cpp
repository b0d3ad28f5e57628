// Opening a token file. The HDF5 library reads the structure; every size is then compared with the file
// itself, and the tokens are mapped, so that no library call lies on the way of a batch.

#include <fcntl.h>
#include <fmt/format.h>
#include <hdf5.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "data/token_dataset.h"
#include "kernels/core/check.h"

namespace upmoe {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are mapped as they are");

constexpr const char* kFormat = "upmoe-tokens-1";
constexpr std::int64_t kMaxVocab = std::numeric_limits<std::int32_t>::max();

// Closes an HDF5 identifier of any kind.
class Hdf5Id {
 public:
  Hdf5Id(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Hdf5Id() {
    if (id_ >= 0) close_(id_);
  }
  Hdf5Id(const Hdf5Id&) = delete;
  hid_t get() const { return id_; }
  bool good() const { return id_ >= 0; }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

// The library prints its error stack unless told otherwise; our messages say what the reader needs.
class QuietHdf5 {
 public:
  QuietHdf5() {
    H5Eget_auto2(H5E_DEFAULT, &function_, &data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  ~QuietHdf5() { H5Eset_auto2(H5E_DEFAULT, function_, data_); }
  QuietHdf5(const QuietHdf5&) = delete;

 private:
  H5E_auto2_t function_ = nullptr;
  void* data_ = nullptr;
};

class Reader {
 public:
  explicit Reader(const std::filesystem::path& path)
      : name_(path.string()), file_(H5Fopen(name_.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose) {
    if (!file_.good()) {
      bad("is not a readable HDF5 file (damaged, incomplete, or open for writing elsewhere); make it anew "
          "with "
          "data/tokenize.py");
    }
  }

  template <class... Args>
  [[noreturn]] void bad(fmt::format_string<Args...> format, Args&&... args) const {
    fail(ExitCode::kBadInput, "{}: {}", name_, fmt::format(format, std::forward<Args>(args)...));
  }

  std::int64_t integer(const char* attribute) const {
    const Hdf5Id id = open_attribute(attribute);
    const Hdf5Id type(H5Aget_type(id.get()), H5Tclose);
    if (H5Tget_class(type.get()) != H5T_INTEGER) bad("attribute {}: expected a whole number", attribute);
    std::int64_t value = 0;
    if (H5Aread(id.get(), H5T_NATIVE_INT64, &value) < 0) bad("attribute {} cannot be read", attribute);
    return value;
  }

  std::string text(const char* attribute) const {
    const Hdf5Id id = open_attribute(attribute);
    const Hdf5Id type(H5Aget_type(id.get()), H5Tclose);
    if (H5Tget_class(type.get()) != H5T_STRING) bad("attribute {}: expected a text", attribute);
    if (H5Tis_variable_str(type.get()) > 0) return variable_text(id.get(), type.get(), attribute);
    constexpr std::size_t kLongest = 4096;
    const std::size_t bytes = H5Tget_size(type.get());
    if (bytes > kLongest) bad("attribute {} has {} bytes, at most {} are read", attribute, bytes, kLongest);
    std::string value(bytes, '\0');
    if (H5Aread(id.get(), type.get(), value.data()) < 0) bad("attribute {} cannot be read", attribute);
    return value.substr(0, std::min(value.find('\0'), value.find_last_not_of(' ') + 1));
  }

  struct Extent {
    std::uint64_t offset = 0;  // in the file
    std::int64_t elements = 0;
  };
  // A one-dimensional dataset that lies in this file in one piece.
  Extent contiguous(const char* dataset, hid_t expected_type, const char* type_words,
                    std::uint64_t file_bytes) const {
    H5L_info_t link{};
    if (H5Lexists(file_.get(), dataset, H5P_DEFAULT) <= 0 ||
        H5Lget_info(file_.get(), dataset, &link, H5P_DEFAULT) < 0) {
      bad("dataset '{}' is missing; the format is {}", dataset, kFormat);
    }
    if (link.type != H5L_TYPE_HARD)
      bad("dataset '{}' is a link to another place, which is not followed", dataset);
    const Hdf5Id set(H5Dopen2(file_.get(), dataset, H5P_DEFAULT), H5Dclose);
    if (!set.good()) bad("'{}' is not a dataset", dataset);
    const Hdf5Id plan(H5Dget_create_plist(set.get()), H5Pclose);
    if (H5Pget_layout(plan.get()) != H5D_CONTIGUOUS || H5Pget_external_count(plan.get()) != 0) {
      bad("dataset '{}' must be stored contiguously in this file (it is chunked, virtual, compact or "
          "external)",
          dataset);
    }
    const Hdf5Id type(H5Dget_type(set.get()), H5Tclose);
    if (H5Tequal(type.get(), expected_type) <= 0) bad("dataset '{}': expected {}", dataset, type_words);
    const Hdf5Id space(H5Dget_space(set.get()), H5Sclose);
    if (H5Sget_simple_extent_ndims(space.get()) != 1) bad("dataset '{}': expected one dimension", dataset);
    hsize_t length = 0;
    H5Sget_simple_extent_dims(space.get(), &length, nullptr);
    const std::uint64_t size = H5Tget_size(type.get());
    if (length == 0) bad("dataset '{}' is empty", dataset);
    const haddr_t offset = H5Dget_offset(set.get());
    if (offset == HADDR_UNDEF || offset > file_bytes || length > (file_bytes - offset) / size) {
      bad("dataset '{}' of {} elements does not fit into the file's {} bytes; the file is truncated or "
          "damaged",
          dataset, length, file_bytes);
    }
    return {offset, static_cast<std::int64_t>(length)};
  }

  std::vector<std::int64_t> read_int64(const char* dataset, std::int64_t length) const {
    const Hdf5Id set(H5Dopen2(file_.get(), dataset, H5P_DEFAULT), H5Dclose);
    std::vector<std::int64_t> values(static_cast<std::size_t>(length));
    if (H5Dread(set.get(), H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) < 0) {
      bad("dataset '{}' cannot be read", dataset);
    }
    return values;
  }

 private:
  Hdf5Id open_attribute(const char* attribute) const {
    const hid_t id =
        H5Aexists(file_.get(), attribute) > 0 ? H5Aopen(file_.get(), attribute, H5P_DEFAULT) : -1;
    if (id < 0) bad("attribute '{}' is missing; the format is {}", attribute, kFormat);
    const Hdf5Id space(H5Aget_space(id), H5Sclose);
    if (H5Sget_simple_extent_npoints(space.get()) != 1) {
      H5Aclose(id);
      bad("attribute {}: expected one value", attribute);
    }
    return Hdf5Id(id, H5Aclose);
  }

  std::string variable_text(hid_t id, hid_t file_type, const char* attribute) const {
    const Hdf5Id type(H5Tcopy(H5T_C_S1), H5Tclose);
    H5Tset_size(type.get(), H5T_VARIABLE);
    H5Tset_cset(type.get(), H5Tget_cset(file_type));
    char* value = nullptr;
    if (H5Aread(id, type.get(), &value) < 0) bad("attribute {} cannot be read", attribute);
    const std::string copy = value == nullptr ? "" : value;
    H5free_memory(value);
    return copy;
  }

  std::string name_;
  Hdf5Id file_;
};

void check_document_ends(const Reader& in, const std::vector<std::int64_t>& ends, std::int64_t num_tokens) {
  std::int64_t before = 0;
  for (std::size_t i = 0; i < ends.size(); ++i) {
    if (ends[i] <= before || ends[i] > num_tokens) {
      in.bad("document_ends[{}] = {}, expected more than {} and at most {}", i, ends[i], before, num_tokens);
    }
    before = ends[i];
  }
  if (before != num_tokens)
    in.bad("the last of document_ends is {}, expected {} (all tokens)", before, num_tokens);
}

std::uint64_t size_of_file(const std::filesystem::path& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) {
    fail(ExitCode::kBadInput, "{}: {}", path.string(), std::strerror(errno));
  }
  if (!S_ISREG(info.st_mode)) fail(ExitCode::kBadInput, "{}: is not a regular file", path.string());
  return static_cast<std::uint64_t>(info.st_size);
}

struct Mapping {
  void* begin = nullptr;
  std::size_t bytes = 0;
  const std::byte* data = nullptr;
};

// Maps [offset, offset + bytes) from the page below.
Mapping map_range(const std::filesystem::path& path, std::uint64_t offset, std::uint64_t bytes) {
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t skipped = offset % page;
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(ExitCode::kBadInput, "{}: {}", path.string(), std::strerror(errno));
  Mapping map;
  map.bytes = static_cast<std::size_t>(bytes + skipped);
  map.begin = ::mmap(nullptr, map.bytes, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(offset - skipped));
  const int error = errno;
  ::close(fd);
  if (map.begin == MAP_FAILED) {
    fail(ExitCode::kBadInput, "{}: cannot be mapped: {}", path.string(), std::strerror(error));
  }
  map.data = static_cast<const std::byte*>(map.begin) + skipped;
  return map;
}

}  // namespace

TokenFile::TokenFile(const std::filesystem::path& path) : path_(path) {
  const std::uint64_t file_bytes = size_of_file(path);
  const QuietHdf5 quiet;
  Reader::Extent tokens;
  {
    const Reader in(path);
    if (const std::string format = in.text("format"); format != kFormat) {
      in.bad("attribute format is '{}', expected '{}'", format, kFormat);
    }
    vocab_size_ = in.integer("vocab_size");
    if (vocab_size_ < 1 || vocab_size_ > kMaxVocab) {
      in.bad("attribute vocab_size is {}, expected 1 to {}", vocab_size_, kMaxVocab);
    }
    eos_id_ = in.integer("eos_id");
    if (eos_id_ < -1 || eos_id_ >= vocab_size_) {
      in.bad("attribute eos_id is {}, expected -1 (none) to {}", eos_id_, vocab_size_ - 1);
    }
    tokenizer_sha256_ = in.text("tokenizer_sha256");
    tokens = in.contiguous("tokens", H5T_STD_U32LE, "32-bit unsigned little-endian numbers", file_bytes);
    if (tokens.offset % alignof(std::uint32_t) != 0)
      in.bad("the tokens begin at the odd offset {}", tokens.offset);
    num_tokens_ = tokens.elements;
    const Reader::Extent ends =
        in.contiguous("document_ends", H5T_STD_I64LE, "64-bit signed little-endian numbers", file_bytes);
    if (ends.elements > num_tokens_) in.bad("{} documents, but {} tokens", ends.elements, num_tokens_);
    document_ends_ = in.read_int64("document_ends", ends.elements);
    check_document_ends(in, document_ends_, num_tokens_);
  }
  const auto bytes = static_cast<std::uint64_t>(num_tokens_) * sizeof(std::uint32_t);
  const Mapping map = map_range(path, tokens.offset, bytes);
  map_ = map.begin;
  map_bytes_ = map.bytes;
  tokens_ = reinterpret_cast<const std::uint32_t*>(map.data);
}

TokenFile::~TokenFile() {
  if (map_ != nullptr) ::munmap(map_, map_bytes_);
}

}  // namespace upmoe
