#include <sys/statvfs.h>

#include <algorithm>
#include <cstring>

#include "data/hdf5_file.h"
#include "data/manifest.h"
#include "data/posix_file.h"
#include "data/shard_store.h"

namespace upmoe {

namespace fs = std::filesystem;

struct StoreWriter::Impl {
  fs::path dir, partial;  // DIR and DIR.tmp
  int rank = 0;
  Manifest shard;     // this rank's file and what is in it
  std::string error;  // of write()
  bool committed = false;
};

namespace {

void require_space(const fs::path& dir, std::uint64_t bytes) {
  struct statvfs info {};
  if (statvfs(dir.c_str(), &info) != 0)
    fail(ExitCode::kBadInput, "{}: {}", dir.string(), std::strerror(errno));
  const std::uint64_t available = static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize,
                      needed = bytes + bytes / 20;
  if (available < needed)
    fail(ExitCode::kBadInput,
         "{}: the checkpoint needs {} bytes, {} are free; remove something, or keep fewer checkpoints",
         dir.string(), needed, available);
}

void remove_quietly(const fs::path& path) {
  std::error_code ignored;  // a leftover .tmp folder is never opened and the next save replaces it
  fs::remove_all(path, ignored);
}

// HDF5 may report success after a write that the disk refused: what lies in the file is compared with what
// was meant.
void compare_with_file(const fs::path& path, std::uint64_t offset, ConstTensorView values) {
  const PosixFile file = PosixFile::open_read(path);
  std::vector<std::byte> block(std::size_t{1} << 20);
  for (std::size_t at = 0; at < values.bytes(); at += block.size()) {
    const std::size_t n = std::min(block.size(), values.bytes() - at);
    file.read(offset + at, std::span(block).first(n));
    if (std::memcmp(block.data(), values.data + at, n) != 0)
      fail(ExitCode::kBadInput,
           "{}: bytes {} and on are not what was written; the disk may be full or failing", path.string(),
           offset + at);
  }
}

Manifest write_shard(const fs::path& folder, int rank, const std::vector<StorePiece>& pieces) {
  Manifest shard;
  const std::string name = fmt::format("shard_{:05}.h5", rank);
  const fs::path path = folder / name;
  Hdf5Writer hdf5(path);
  std::vector<std::uint64_t> offsets;
  for (const StorePiece& p : pieces) {
    StoredPiece stored;
    stored.dataset = "/" + p.kind + "/" + p.tensor;
    stored.boxes = p.boxes;
    stored.offset = hdf5.write_flat(stored.dataset, p.values);
    offsets.push_back(stored.offset);
    const bool fresh =
        shard.tensors.emplace(std::pair(p.tensor, p.kind), StoredTensor{p.global, p.values.dtype, {stored}})
            .second;
    UPMOE_CHECK(fresh, "{} ({}) given twice", p.tensor, p.kind);
  }
  hdf5.close();
  sync_path(path);
  for (std::size_t i = 0; i < pieces.size(); ++i) compare_with_file(path, offsets[i], pieces[i].values);
  shard.files.push_back({name, PosixFile::open_read(path).size(), crc32c_of_file(path)});
  return shard;
}

// Everybody's text, on every rank.
std::vector<std::string> gather_text(Communicator& world, const std::string& mine) {
  const auto n = static_cast<std::size_t>(world.size());
  std::vector<std::int64_t> lengths(n);
  const auto length = static_cast<std::int64_t>(mine.size());
  world.all_gather(host_view(lengths.data(), {world.size()}), host_view(&length, {1})).wait();
  const auto words = static_cast<std::size_t>((*std::max_element(lengths.begin(), lengths.end()) + 3) / 4);
  std::vector<std::int32_t> own(words), all(words * n);
  std::memcpy(own.data(), mine.data(), mine.size());
  const auto w = static_cast<std::int64_t>(words);
  world.all_gather(host_view(all.data(), {world.size(), w}), host_view(std::as_const(own).data(), {w}))
      .wait();
  std::vector<std::string> texts;
  for (std::size_t r = 0; r < n; ++r)
    texts.emplace_back(reinterpret_cast<const char*>(all.data() + r * words),
                       static_cast<std::size_t>(lengths[r]));
  return texts;
}

void write_index(const fs::path& folder, const Manifest& manifest) {
  const fs::path path = folder / "index.h5";
  Hdf5Writer index(path);
  for (const auto& [key, tensor] : manifest.tensors)
    index.write_virtual("/" + key.second + "/" + key.first, tensor, manifest.files);
  index.close();
  sync_path(path);
}

}  // namespace

StoreWriter::StoreWriter(const fs::path& dir, Communicator& world, std::uint64_t bytes)
    : impl_(std::make_unique<Impl>()) {
  impl_->dir = dir;
  impl_->partial = dir;
  impl_->partial += ".tmp";
  impl_->rank = world.rank();
  auto total = static_cast<std::int64_t>(bytes);
  world.all_reduce(host_view(&total, {1}), ReduceOp::kSum);
  run_agreed(world, [&] {
    if (world.rank() != 0) return;
    if (fs::exists(dir)) fail(ExitCode::kBadInput, "{}: exists already", dir.string());
    fs::create_directories(dir.parent_path());
    fs::remove_all(impl_->partial);  // of an attempt that was cut off
    require_space(dir.parent_path(), static_cast<std::uint64_t>(total));
    fs::create_directory(impl_->partial);
  });
}

StoreWriter::~StoreWriter() {
  if (!impl_->committed && impl_->rank == 0) remove_quietly(impl_->partial);
}

void StoreWriter::write(const std::vector<StorePiece>& pieces) noexcept {
  try {
    impl_->shard = write_shard(impl_->partial, impl_->rank, pieces);
  } catch (const std::exception& e) {
    impl_->error = e.what();
  }
}

void StoreWriter::commit(Communicator& world, const std::string& metadata_json) {
  agree(world, ExitCode::kBadInput, impl_->error);
  const std::vector<std::string> shards = gather_text(world, shard_json(impl_->shard));
  run_agreed(world, [&] {
    if (world.rank() != 0) return;
    Manifest manifest;
    manifest.run = metadata_json;
    for (const std::string& s : shards) merge(manifest, parse_shard(s));
    write_index(impl_->partial, manifest);
    const fs::path index = impl_->partial / "index.h5";
    manifest.files.push_back({"index.h5", PosixFile::open_read(index).size(), crc32c_of_file(index)});
    write_text_synced(impl_->partial / "manifest.json", manifest_json(manifest));
    sync_path(impl_->partial);
    fs::rename(impl_->partial, impl_->dir);  // the one moment at which the checkpoint comes into being
    sync_path(impl_->dir.parent_path());
  });
  impl_->committed = true;
}

void write_store(const fs::path& dir, Communicator& world, const std::vector<StorePiece>& pieces,
                 const std::string& metadata_json) {
  std::uint64_t bytes = 0;
  for (const StorePiece& p : pieces) bytes += p.values.bytes();
  StoreWriter writer(dir, world, bytes);
  writer.write(pieces);
  writer.commit(world, metadata_json);
}

}  // namespace upmoe
