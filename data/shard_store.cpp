#include "data/shard_store.h"

#include <mutex>
#include <optional>

#include "data/box_runs.h"
#include "data/folder.h"
#include "data/manifest.h"
#include "data/posix_file.h"
#include "data/store_check.h"

namespace upmoe {

namespace fs = std::filesystem;

struct ShardStore::Impl {
  fs::path dir;
  Manifest manifest;
  mutable std::mutex mutex;
  mutable std::vector<char> verified;  // by file

  fs::path path(std::size_t file) const { return dir / manifest.files[file].name; }

  // The whole file's checksum, once before its first use.
  void require_intact(std::size_t file) const {
    const std::lock_guard lock(mutex);
    if (verified[file] != 0) return;
    require_checksum(path(file), crc32c_of_file(path(file)), manifest.files[file].crc);
    verified[file] = 1;
  }
};

namespace {

constexpr std::uint64_t kManifestLimit = std::uint64_t{1} << 30;

// Reads `elements` values stored as `from` into values of `out`'s dtype.
void read_values(const PosixFile& file, std::uint64_t offset, DType from, std::int64_t elements,
                 TensorView out, std::int64_t at) {
  const std::size_t bytes = static_cast<std::size_t>(elements) * size_of(from);
  std::byte* to = out.data + static_cast<std::size_t>(at) * size_of(out.dtype);
  if (from == out.dtype) return file.read(offset, {to, bytes});
  std::vector<std::byte> staged(bytes);
  file.read(offset, staged);
  for (std::int64_t i = 0; i < elements; ++i) {
    if (from == DType::kBF16) {
      reinterpret_cast<float*>(to)[i] = to_float(reinterpret_cast<const bf16*>(staged.data())[i]);
    } else {
      reinterpret_cast<bf16*>(to)[i] = to_bf16(reinterpret_cast<const float*>(staged.data())[i]);
    }
  }
}

}  // namespace

ShardStore::ShardStore(const fs::path& dir) : impl_(std::make_unique<Impl>()) {
  impl_->dir = dir;
  const fs::path path = dir / "manifest.json";
  if (!path_exists(path))
    fail(ExitCode::kBadInput, "{}: no manifest.json: not a checkpoint, or one that was never completed",
         dir.string());
  impl_->manifest = parse_manifest(read_text(path, kManifestLimit), path.string());
  const Manifest& m = impl_->manifest;
  for (std::size_t f = 0; f < m.files.size(); ++f) {
    const std::uint64_t found = PosixFile::open_read(impl_->path(f)).size();
    if (found != m.files[f].bytes)
      fail(ExitCode::kBadInput, "{}: {} bytes, expected {}; use an older checkpoint", impl_->path(f).string(),
           found, m.files[f].bytes);
  }
  impl_->verified.assign(m.files.size(), 0);
  metadata_ = m.run;
  for (const auto& [key, t] : m.tensors) tensors_[key] = {t.shape, t.dtype};
}

ShardStore::~ShardStore() = default;

void ShardStore::read(std::string_view tensor, std::string_view kind, const Box& box, TensorView out) const {
  const auto it = impl_->manifest.tensors.find({std::string(tensor), std::string(kind)});
  if (it == impl_->manifest.tensors.end())
    fail(ExitCode::kBadInput, "{}: holds no tensor {} ({})", impl_->dir.string(), tensor, kind);
  const StoredTensor& t = it->second;
  UPMOE_CHECK(contains(whole(t.shape), box) && out.elements() == box.elements(), "box {} + {} of {} into {}",
              box.offset.str(), box.extent.str(), t.shape.str(), out.shape.str());
  UPMOE_CHECK(out.dtype == DType::kF32 || out.dtype == DType::kBF16, "stores give fp32 and bf16, not {}",
              name_of(out.dtype));
  std::int64_t filled = 0;
  for (const StoredPiece& p : t.pieces) {
    std::int64_t before = 0;  // elements of the piece's earlier boxes
    std::optional<PosixFile> file;
    for (const Box& stored : p.boxes) {
      // What was written under one layout is read under another: of each stored box the part that is wanted, run by
      // run.
      const Box region = intersect(stored, box);
      if (region.elements() > 0 && !file) {
        impl_->require_intact(p.file);
        file.emplace(PosixFile::open_read(impl_->path(p.file)));
      }
      for_runs(stored, box, region, [&](std::int64_t from, std::int64_t to, std::int64_t n) {
        const std::uint64_t at = p.offset + static_cast<std::uint64_t>(before + from) * size_of(t.dtype);
        read_values(*file, at, t.dtype, n, out, to);
        filled += n;
      });
      before += stored.elements();
    }
  }
  if (filled != box.elements())
    fail(ExitCode::kBadInput, "{}: {} ({}): {} of {} elements are there", impl_->dir.string(), tensor, kind,
         filled, box.elements());
}

void ShardStore::read_best(std::string_view tensor, const Box& box, TensorView out) const {
  const bool master = out.dtype == DType::kF32 && tensors_.contains({std::string(tensor), "master"});
  read(tensor, master ? "master" : "weight", box, out);
}

const fs::path& ShardStore::dir() const {
  return impl_->dir;
}
const Manifest& ShardStore::manifest() const {
  return impl_->manifest;
}

void ShardStore::verify() const {
  for (std::size_t f = 0; f < impl_->manifest.files.size(); ++f) impl_->require_intact(f);
}

}  // namespace upmoe
