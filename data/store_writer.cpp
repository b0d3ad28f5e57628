#include <sys/statvfs.h>

#include <algorithm>
#include <cstring>

#include "data/hdf5_file.h"
#include "data/manifest.h"
#include "data/posix_file.h"
#include "data/shard_store.h"
#include "data/shard_writer.h"

namespace upmoe {

namespace fs = std::filesystem;

struct StoreWriter::Impl {
  fs::path dir, partial;  // DIR and DIR.tmp
  int rank = 0;
  Manifest shard;     // this rank's file and what is in it
  std::string error;  // of write()
  ExitCode code = ExitCode::kBadInput;
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
  write(pieces, {});
}

void StoreWriter::write(const std::vector<StorePiece>& pieces,
                        const std::function<void(const PutBlock& put)>& produce) noexcept {
  try {
    ShardWriter shard(impl_->partial, impl_->rank, pieces);
    shard.write_values();
    if (produce)
      produce([&](const StoreBlock& block, std::span<const std::byte> values) { shard.put(block, values); });
    impl_->shard = shard.finish();
  } catch (const Error& e) {
    impl_->error = e.what();
    impl_->code = e.code();
  } catch (const std::exception& e) {
    impl_->error = e.what();
  }
}

void StoreWriter::commit(Communicator& world, const std::string& metadata_json, const AddFiles& add_files) {
  agree(world, impl_->code, impl_->error);
  const std::vector<std::string> shards = gather_text(world, shard_json(impl_->shard));
  run_agreed(world, [&] {
    if (world.rank() != 0) return;
    Manifest manifest;
    manifest.run = metadata_json;
    for (const std::string& s : shards) merge(manifest, parse_shard(s));
    write_index(impl_->partial, manifest);
    const fs::path index = impl_->partial / "index.h5";
    manifest.files.push_back({"index.h5", PosixFile::open_read(index).size(), crc32c_of_file(index)});
    if (add_files) add_files(impl_->partial);
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
