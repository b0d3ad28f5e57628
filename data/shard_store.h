#pragma once
// A folder of tensors in global coordinates that any layout can open: one HDF5 shard file per rank with flat
// datasets, index.h5 with one virtual dataset per (tensor, kind) in its global shape for any HDF5 reader,
// manifest.json with sizes and CRC-32C of every file. Written to DIR.tmp and renamed: complete or invisible.
// The index is never trusted: opening checks the manifest's files for presence and size, reading checks the
// bytes' checksums before use.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
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
  void complete(Manifest manifest, const AddFiles& add_files);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The three parts at once. Collective.
void write_store(const std::filesystem::path& dir, Communicator& world, const std::vector<StorePiece>& pieces,
                 const std::string& metadata_json);

class ShardStore {
 public:
  // Throws Error(kBadInput) naming file, found and expected, when the folder is incomplete or damaged.
  explicit ShardStore(const std::filesystem::path& dir);
  ~ShardStore();
  ShardStore(const ShardStore&) = delete;
  const std::string& metadata_json() const { return metadata_; }
  struct Tensor {
    Shape shape;
    DType dtype;
  };
  const std::map<std::pair<std::string, std::string>, Tensor>& tensors() const {
    return tensors_;
  }  // (name, kind)
  // Any box, whatever the layout that wrote it; same dtype as stored, or fp32 from bf16 and back (rounded).
  void read(std::string_view tensor, std::string_view kind, const Box& box, TensorView out) const;
  // The best value there is of a parameter: as fp32 its master where one is stored, else its weight. As bf16
  // the weight, which is the master rounded.
  void read_best(std::string_view tensor, const Box& box, TensorView out) const;
  void verify() const;  // reads every file and compares its checksum
  const std::filesystem::path& dir() const;
  const Manifest& manifest() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::string metadata_;
  std::map<std::pair<std::string, std::string>, Tensor> tensors_;
};

}  // namespace upmoe
