#pragma once
// A folder of tensors in global coordinates that any layout can open: one HDF5 shard file per rank with flat
// datasets, index.h5 with one virtual dataset per (tensor, kind) in its global shape for any HDF5 reader,
// manifest.json with sizes and CRC-32C of every file. store_writer.h writes it: complete or invisible.
// The index is never trusted: opening checks the manifest's files for presence and size, reading checks the
// bytes' checksums before use.

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "kernels/core/tensor.h"
#include "parallel/layout.h"

namespace upmoe {

struct Manifest;

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
  // By name and kind.
  const std::map<std::pair<std::string, std::string>, Tensor>& tensors() const { return tensors_; }
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
