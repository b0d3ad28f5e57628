#include "data/checkpoint_folder.h"
#include "data/folder.h"
#include "data/hdf5_file.h"
#include "data/manifest.h"
#include "data/posix_file.h"
#include "data/shard_store.h"
#include "data/shard_writer.h"
#include "data/staged_directory.h"
#include "kernels/core/log.h"
#include "parallel/texts.h"

namespace upmoe {

namespace fs = std::filesystem;

struct StoreWriter::Impl {
  fs::path dir, partial;  // DIR and DIR.tmp
  int rank = 0;
  Manifest shard;     // this rank's file and what is in it
  std::string error;  // of write()
  ExitCode code = ExitCode::kBadInput;
  bool made = false;      // the partial folder, by rank 0
  bool no_space = false;  // why write() or commit() failed, on this rank
  bool committed = false;
};

namespace {

// The name says where a store is prepared, not whose folder it is: what no writer left is kept.
void clear_partial(const fs::path& partial) {
  if (!path_exists(partial) || (is_leftover(partial) && remove_store(partial))) return;
  const fs::path to = set_aside(partial);
  log::warning("{} stands where a checkpoint is prepared, and holds what no run left: set aside as {}",
               partial.string(), to.filename().string());
}

void remove_quietly(const fs::path& partial) {
  try {
    remove_store(partial);
  } catch (const Error&) {  // a leftover .tmp folder is never opened and the next save replaces it
  }
}

void write_index(const fs::path& folder, const Manifest& manifest) {
  const fs::path path = folder / "index.h5";
  Hdf5Writer index(path);
  for (const auto& [key, tensor] : manifest.tensors)
    index.write_virtual("/" + key.second + "/" + key.first, tensor, manifest.files);
  index.close();
  sync_path(path);
}

Manifest merged(const std::vector<std::string>& shards, const std::string& metadata_json) {
  Manifest manifest;
  manifest.run = metadata_json;
  for (const std::string& s : shards) merge(manifest, parse_shard(s));
  return manifest;
}

bool is_no_space(const Error& e) {
  const auto* system = dynamic_cast<const SystemError*>(&e);
  return system != nullptr && system->is_no_space();
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
    if (path_exists(dir)) fail(ExitCode::kBadInput, "{}: exists already", dir.string());
    const fs::path parent = fs::absolute(dir).parent_path();
    make_folders(parent);
    clear_partial(impl_->partial);
    require_free_space(parent, StoreWriter::space_for(static_cast<std::uint64_t>(total)));
    make_folder(impl_->partial);
    impl_->made = true;
  });
}

StoreWriter::~StoreWriter() {
  if (impl_->made && !impl_->committed) remove_quietly(impl_->partial);
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
    impl_->no_space = is_no_space(e);
  } catch (const std::exception& e) {
    impl_->error = e.what();
  }
}

// On rank 0: all that is beside the shards, then the name.
void StoreWriter::complete(Manifest manifest, const AddFiles& add_files) {
  write_index(impl_->partial, manifest);
  const fs::path index = impl_->partial / "index.h5";
  manifest.files.push_back({"index.h5", PosixFile::open_read(index).size(), crc32c_of_file(index)});
  if (add_files) add_files(impl_->partial);
  write_text_synced(impl_->partial / "manifest.json", manifest_json(manifest));
  sync_path(impl_->partial);
  move_path(impl_->partial, impl_->dir);  // the one moment at which the checkpoint comes into being
}

bool StoreWriter::lacked_space() const {
  return impl_->no_space;
}

std::uint64_t StoreWriter::space_for(std::uint64_t bytes) {
  return bytes + bytes / 20;
}

bool StoreWriter::commit(Communicator& world, const std::string& metadata_json, const AddFiles& add_files) {
  agree(world, impl_->code, impl_->error);
  const std::vector<std::string> shards = gather_text(world, shard_json(impl_->shard));
  std::int64_t durable = 1;
  run_agreed(world, [&] {
    if (world.rank() != 0) return;
    try {
      complete(merged(shards, metadata_json), add_files);
    } catch (const Error& e) {
      impl_->no_space = is_no_space(e);
      throw;
    }
    durable = confirm_name(impl_->dir) ? 1 : 0;
  });
  impl_->committed = true;
  world.broadcast(host_view(&durable, {1}), 0);
  return durable == 1;
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
