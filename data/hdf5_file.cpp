#include "data/hdf5_file.h"

#include <hdf5.h>

#include <limits>
#include <mutex>

#include "data/direct_file.h"

namespace upmoe {

namespace {

// The library's own clean-up at exit() follows dangling pointers after a file that could not be closed (a full
// disk), and turns a reported error into a crash. Files are closed here, so nothing is left for it to do.
[[maybe_unused]] const herr_t no_clean_up_at_exit = H5dont_atexit();

// Datasets from this length on begin at a disk block, so that they can be written past the page cache.
constexpr hsize_t kAlignedFrom = hsize_t{1} << 20;

std::mutex& library() {
  static std::mutex m;
  return m;
}

std::string library_message() {
  std::string text;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned, const H5E_error2_t* e, void* out) -> herr_t {
        auto& s = *static_cast<std::string*>(out);
        if (s.empty() && e->desc != nullptr) s = e->desc;
        return 0;
      },
      &text);
  return text;
}

// An identifier that closes itself; negative results throw with the library's own words.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t), const std::string& what) : id_(id), close_(close) {
    if (id < 0) fail(ExitCode::kBadInput, "{}: {}", what, library_message());
  }
  ~Handle() {
    if (id_ >= 0) close_(id_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }  // NOLINT(google-explicit-constructor)
  hid_t release() {
    const hid_t id = id_;
    id_ = -1;
    return id;
  }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

void check(herr_t result, const std::string& what) {
  if (result < 0) fail(ExitCode::kBadInput, "{}: {}", what, library_message());
}

// bf16 as a native 16-bit float: 1 sign, 8 exponent, 7 mantissa bits.
hid_t make_type(DType dtype) {
  if (dtype == DType::kF32) return H5Tcopy(H5T_IEEE_F32LE);
  UPMOE_CHECK(dtype == DType::kBF16, "stores hold fp32 and bf16, not {}", name_of(dtype));
  const hid_t type = H5Tcopy(H5T_IEEE_F32LE);
  if (type < 0 || H5Tset_fields(type, 15, 7, 8, 0, 7) < 0 || H5Tset_size(type, 2) < 0 ||
      H5Tset_ebias(type, 127) < 0)
    return -1;
  return type;
}

std::vector<hsize_t> sizes_of(const Shape& s) {
  std::vector<hsize_t> v;
  for (int i = 0; i < s.rank; ++i) v.push_back(static_cast<hsize_t>(s[i]));
  return v;
}

}  // namespace

struct Hdf5Writer::Impl {
  std::filesystem::path path;
  hid_t file = -1;
  hid_t create_groups = -1;
};

Hdf5Writer::Hdf5Writer(const std::filesystem::path& path) : impl_(std::make_unique<Impl>()) {
  const std::lock_guard lock(library());
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  impl_->path = path;
  impl_->create_groups = H5Pcreate(H5P_LINK_CREATE);
  check(H5Pset_create_intermediate_group(impl_->create_groups, 1), path.string());
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose, path.string());
  check(H5Pset_alignment(access, kAlignedFrom, kDiskBlock), path.string());
  impl_->file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
  if (impl_->file < 0)
    fail(ExitCode::kBadInput, "{}: cannot be created: {}", path.string(), library_message());
}

Hdf5Writer::~Hdf5Writer() {
  const std::lock_guard lock(library());
  if (impl_->create_groups >= 0) H5Pclose(impl_->create_groups);
  if (impl_->file >= 0) H5Fclose(impl_->file);
}

std::uint64_t Hdf5Writer::reserve_flat(const std::string& dataset, DType dtype, std::int64_t elements) {
  const std::lock_guard lock(library());
  const std::string what = impl_->path.string() + ": " + dataset;
  const auto n = static_cast<hsize_t>(elements);
  const Handle type(make_type(dtype), H5Tclose, what),
      space(H5Screate_simple(1, &n, nullptr), H5Sclose, what);
  const Handle how(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, what);
  check(H5Pset_obj_track_times(how, false), what);  // the same tensors are the same file at any time
  // Early and unfilled: the dataset has its place at once, and not a byte of it is written twice.
  check(H5Pset_alloc_time(how, H5D_ALLOC_TIME_EARLY), what);
  check(H5Pset_fill_time(how, H5D_FILL_TIME_NEVER), what);
  const Handle data(
      H5Dcreate2(impl_->file, dataset.c_str(), type, space, impl_->create_groups, how, H5P_DEFAULT), H5Dclose,
      what);
  if (n == 0) return 0;
  const haddr_t offset = H5Dget_offset(data);
  if (offset == HADDR_UNDEF) fail(ExitCode::kBadInput, "{}: the data has no place in the file", what);
  return offset;
}

void Hdf5Writer::write_virtual(const std::string& dataset, const StoredTensor& tensor,
                               const std::vector<StoredFile>& files) {
  const std::lock_guard lock(library());
  const std::string what = impl_->path.string() + ": " + dataset;
  const std::vector<hsize_t> dims = sizes_of(tensor.shape);
  const Handle type(make_type(tensor.dtype), H5Tclose, what);
  const Handle space(H5Screate_simple(tensor.shape.rank, dims.data(), nullptr), H5Sclose, what);
  const Handle how(H5Pcreate(H5P_DATASET_CREATE), H5Pclose, what);
  check(H5Pset_obj_track_times(how, false), what);
  const float hole = std::numeric_limits<float>::quiet_NaN();  // HDF5 fills silently where a file is missing
  check(H5Pset_fill_value(how, H5T_NATIVE_FLOAT, &hole), what);
  for (const StoredPiece& p : tensor.pieces) {
    std::int64_t total = 0;
    for (const Box& b : p.boxes) total += b.elements();
    if (total == 0) continue;
    const auto source_size = static_cast<hsize_t>(total);
    hsize_t at = 0;
    // The piece's flat dataset holds its boxes one behind the other; each maps onto its place in the whole tensor:
    //
    //   shard, flat    | box 0: 4 | box 1: 6 |
    //   index, [3, 4]    . . a a
    //                    a a b b          a row-major selection on each side, of the same number of elements
    //                    b b b b
    for (const Box& b : p.boxes) {
      const auto n = static_cast<hsize_t>(b.elements());
      if (n == 0) continue;
      const Handle source(H5Screate_simple(1, &source_size, nullptr), H5Sclose, what);
      check(H5Sselect_hyperslab(source, H5S_SELECT_SET, &at, nullptr, &n, nullptr), what);
      check(H5Sselect_hyperslab(space, H5S_SELECT_SET, sizes_of(b.offset).data(), nullptr,
                                sizes_of(b.extent).data(), nullptr),
            what);
      check(H5Pset_virtual(how, space, files[p.file].name.c_str(), p.dataset.c_str(), source), what);
      at += n;
    }
  }
  check(H5Sselect_all(space), what);
  const Handle data(
      H5Dcreate2(impl_->file, dataset.c_str(), type, space, impl_->create_groups, how, H5P_DEFAULT), H5Dclose,
      what);
}

void Hdf5Writer::close() {
  const std::lock_guard lock(library());
  const herr_t flushed = H5Fflush(impl_->file, H5F_SCOPE_LOCAL), closed = H5Fclose(impl_->file);
  impl_->file = -1;
  if (flushed < 0 || closed < 0)
    fail(ExitCode::kBadInput, "{}: could not be completed: {}", impl_->path.string(), library_message());
}

std::string hdf5_library() {
  const std::lock_guard lock(library());
  unsigned major = 0, minor = 0, release = 0;
  if (H5get_libversion(&major, &minor, &release) < 0)
    fail(ExitCode::kFailure, "HDF5 does not tell its version");
  return fmt::format("{}.{}.{}", major, minor, release);
}

}  // namespace upmoe
