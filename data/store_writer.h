#pragma once
// Writing a shard store (shard_store.h): a file from each rank, and what rank 0 lays beside them.
//
// A store DIR is made in DIR.tmp and renamed: complete or invisible. Other output is made under a name and a lock
// of its own (staged_directory.h); a store's name is fixed, because
// - a run's saves need no lock each: the run holds one for all of them (trainer/run_lock.h);
// - the next save of the step, and the next start of the run, must know what a killed save left for a left-over;
// - whoever looks for checkpoints sees by the name that this is none (checkpoint_folder.h).
// What is no run's, an upcycled store, is staged as other output is: StoreWriter::in.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/tensor.h"
#include "parallel/communicator.h"
#include "parallel/layout.h"

namespace upmoe {

struct Manifest;

// What one rank adds: the boxes it owns of one global tensor, and their elements one box behind the other.
struct StorePiece {
  std::string tensor;  // e.g. "layers.3.moe.down_EDF"
  std::string kind;    // weight | master | m | v
  Shape global;
  std::vector<Box> boxes;  // may be empty
  ConstTensorView values;  // flat, host memory, fp32 or bf16; data null: they are handed over in blocks
};

struct StoreBlock {
  std::size_t piece = 0;  // index into the pieces
  Range range;            // of the piece's flat values
};
using PutBlock = std::function<void(const StoreBlock& block, std::span<const std::byte> values)>;

// Writing in three parts, so that the middle one can run on a background thread while training goes on:
//
//   StoreWriter w(dir, world, bytes);  // collective: makes DIR.tmp in place of a leftover one (of other
//                                      // content: that is set aside), refuses an existing dir, checks free
//                                      // space for the sum of `bytes` of all ranks
//   w.write(pieces);                   // local, any thread, no communication: this rank's shard, on disk,
//                                      // read again and compared
//   w.commit(world, metadata);         // collective: agrees that all ranks wrote, index, manifest, rename,
//                                      // all of it fsynced
//
// Every failure (full disk, short write, a peer's error) is agreed on in the constructor or in commit: all
// ranks throw and no trace but a .tmp folder remains, which is removed where possible. An error of write() is
// remembered and thrown by commit. `metadata_json` (an object) is stored in the manifest under "run".
class StoreWriter {
 public:
  StoreWriter(const std::filesystem::path& dir, Communicator& world, std::uint64_t bytes);
  // Into a folder that is there for all ranks: who made it gives it its name after commit(), or removes it.
  static StoreWriter in(const std::filesystem::path& folder, const Communicator& world);
  ~StoreWriter();
  StoreWriter(const StoreWriter&) = delete;
  void write(const std::vector<StorePiece>& pieces) noexcept;
  // For a share that does not fit into memory: `produce` makes the values of the pieces that have none and
  // calls `put` with every element of them once, in blocks of any order, on one thread at a time. A block is
  // written when put returns; its checksum stands in for it when the file is read again. What `produce`
  // throws is an error of write().
  void write(const std::vector<StorePiece>& pieces,
             const std::function<void(const PutBlock& put)>& produce) noexcept;
  // `add_files`, where given, is called on rank 0 with the folder before it gets its name: files that lie
  // beside the store's own.
  using AddFiles = std::function<void(const std::filesystem::path& folder)>;
  // False when the store is complete under its name but the disk did not confirm the name (a warning tells
  // why): the one state in between, no reason to write it again.
  bool commit(Communicator& world, const std::string& metadata_json, const AddFiles& add_files = {});
  bool lacked_space() const;  // after a failure: whether this rank met a full disk, a quota or a limit
  static std::uint64_t space_for(std::uint64_t bytes);  // bytes of disk that a store of so many values needs

 private:
  struct Impl;
  explicit StoreWriter(std::unique_ptr<Impl> impl);
  bool complete(Manifest manifest, const AddFiles& add_files);
  std::unique_ptr<Impl> impl_;
};

}  // namespace upmoe
