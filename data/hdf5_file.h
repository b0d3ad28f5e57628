#pragma once
// The part of HDF5 that stores need, with every return checked. HDF5 is one lock for the whole process here.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "data/manifest.h"

namespace upmoe {

std::string hdf5_library();  // "1.10.8", the one that was loaded

class Hdf5Writer {
 public:
  explicit Hdf5Writer(const std::filesystem::path& path);  // new file
  ~Hdf5Writer();
  Hdf5Writer(const Hdf5Writer&) = delete;
  // One flat contiguous dataset, given its place in the file and no values: they are written there by other
  // means once this writer is closed. Returns the byte offset of that place (0 when empty).
  std::uint64_t reserve_flat(const std::string& dataset, DType dtype, std::int64_t elements);
  // A dataset of the tensor's global shape that maps onto the flat datasets of its pieces; NaN
  // where nothing is mapped.
  void write_virtual(const std::string& dataset, const StoredTensor& tensor,
                     const std::vector<StoredFile>& files);
  void close();  // throws when the library lost something

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace upmoe
