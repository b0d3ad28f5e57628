#include "data/store_writer.h"

#include <optional>

#include "data/checkpoint_folder.h"
#include "data/folder.h"
#include "data/hdf5_file.h"
#include "data/manifest.h"
#include "data/partial_folder.h"
#include "data/posix_file.h"
#include "data/shard_writer.h"
#include "kernels/core/log.h"
#include "parallel/texts.h"

namespace upmoe {

namespace fs = std::filesystem;

struct StoreWriter::Impl {
  fs::path folder;  // to be filled
  int rank = 0;
  std::optional<PartialFolder> stage;  // of rank 0, unless the caller stages
  Manifest shard;                      // this rank's file and what is in it
  std::string error;                   // of write()
  ExitCode code = ExitCode::kBadInput;
  bool no_space = false;  // why write() or commit() failed, on this rank
};

namespace {

// The name says where a store is prepared, not whose folder it is: what no writer left is kept.
void clear_partial(const fs::path& partial) {
  if (!path_exists(partial) || (is_leftover(partial) && remove_store(partial))) return;
  const fs::path to = set_aside(partial);
  log::warning("{} stands where a checkpoint is prepared, and holds what no run left: set aside as {}",
               partial.string(), to.filename().string());
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

StoreWriter::StoreWriter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

StoreWriter::~StoreWriter() = default;

StoreWriter StoreWriter::in(const fs::path& folder, const Communicator& world) {
  auto impl = std::make_unique<Impl>();
  impl->folder = folder;
  impl->rank = world.rank();
  return StoreWriter(std::move(impl));
}

// A save, and where the ranks meet (|):
//
//   rank 0  | free space, make DIR.tmp |  shard 0  | index.h5, manifest.json, rename to DIR | durable?
//   rank 1  |                          |  shard 1  |                                        |
//   rank 2  |                          |  shard 2  |                                        |
//            constructor                  write()    commit()
//
// write() meets nobody: it may run in a thread beside training, whose messages it must not get among. So its error
// waits for commit(), as the ranks would not all leave otherwise.
StoreWriter::StoreWriter(const fs::path& dir, Communicator& world, std::uint64_t bytes)
    : impl_(std::make_unique<Impl>()) {
  impl_->folder = dir;
  impl_->folder += ".tmp";
  impl_->rank = world.rank();
  auto total = static_cast<std::int64_t>(bytes);
  world.all_reduce(host_view(&total, {1}), ReduceOp::kSum);
  run_agreed(world, [&] {
    if (world.rank() != 0) return;
    if (path_exists(dir)) fail(ExitCode::kBadInput, "{}: exists already", dir.string());
    const fs::path parent = fs::absolute(dir).parent_path();
    make_folders(parent);
    clear_partial(impl_->folder);
    require_free_space(parent, StoreWriter::space_for(static_cast<std::uint64_t>(total)));
    impl_->stage.emplace(impl_->folder, dir, Existing::kStays, remove_store);
    impl_->stage->create();
  });
}

void StoreWriter::write(const std::vector<StorePiece>& pieces) noexcept {
  write(pieces, {});
}

void StoreWriter::write(const std::vector<StorePiece>& pieces,
                        const std::function<void(const PutBlock& put)>& produce) noexcept {
  try {
    ShardWriter shard(impl_->folder, impl_->rank, pieces);
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
bool StoreWriter::complete(Manifest manifest, const AddFiles& add_files) {
  const fs::path& folder = impl_->folder;
  write_index(folder, manifest);
  const fs::path index = folder / "index.h5";
  manifest.files.push_back({"index.h5", PosixFile::open_read(index).size(), crc32c_of_file(index)});
  if (add_files) add_files(folder);
  // Last of all files, and the only one without which nothing opens: what a power cut leaves of the folder is no store.
  write_text_synced(folder / "manifest.json", manifest_json(manifest));
  return !impl_->stage || impl_->stage->commit();
}

bool StoreWriter::lacked_space() const {
  return impl_->no_space;
}

std::uint64_t StoreWriter::space_for(std::uint64_t bytes) {
  return bytes + bytes / 20;
}

bool StoreWriter::commit(Communicator& world, const std::string& metadata_json, const AddFiles& add_files) {
  // Here the ranks meet for the first time since the constructor: before it no rank knows whether the others have
  // written.
  agree(world, impl_->code, impl_->error);
  const std::vector<std::string> shards = gather_text(world, shard_json(impl_->shard));
  std::int64_t durable = 1;
  run_agreed(world, [&] {
    if (world.rank() != 0) return;
    try {
      durable = complete(merged(shards, metadata_json), add_files) ? 1 : 0;
    } catch (const Error& e) {
      impl_->no_space = is_no_space(e);
      throw;
    }
  });
  world.broadcast(host_view(&durable, {1}), 0);
  return durable == 1;
}

}  // namespace upmoe
