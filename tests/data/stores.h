#pragma once
// What the tests of shard stores share: a folder that goes away, tensors of known values, stores by several ranks.

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "data/shard_store.h"
#include "data/store_writer.h"
#include "kernels/core/philox.h"
#include "parallel/thread_comm.h"
#include "tests/support/random_box.h"
#include "tests/support/read_file.h"
#include "tests/support/temporary_directory.h"

namespace upmoe::test {

namespace fs = std::filesystem;

inline void spill(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

class Stores : public testing::Test {
 protected:
  TemporaryDirectory folder;
  fs::path root = folder.path();
};

inline float weight_at(std::int64_t flat) {
  return static_cast<float>(flat) * 0.37f - 3.0f;
}
// Box and kind of the three tensors of the test; every value is a function of its global position.
struct TestTensor {
  std::string name, kind;
  Shape shape;
  DType dtype;
};
inline const std::vector<TestTensor>& test_tensors() {
  static const std::vector<TestTensor> all{{"layers.3.moe.down_EDF", "weight", {7, 5, 3}, DType::kBF16},
                                           {"layers.3.moe.down_EDF", "master", {7, 5, 3}, DType::kF32},
                                           {"layers.3.moe.gate_up_EF2D", "m", {3, 4, 2, 5}, DType::kF32},
                                           {"norm_D", "weight", {11}, DType::kF32}};
  return all;
}

inline std::vector<float> values_of(const Shape& global, const Box& box) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < box.elements(); ++i) {
    std::int64_t rest = i, flat = 0, stride = 1;
    for (int d = box.extent.rank - 1; d >= 0; --d) {
      flat += (box.offset[d] + rest % box.extent[d]) * stride;
      rest /= box.extent[d];
      stride *= global[d];
    }
    values.push_back(weight_at(flat));
  }
  return values;
}

// This rank's flat slice of every tensor: uneven cuts through rows, empty on rank 0 for norm_D.
struct Pieces {
  std::vector<std::vector<std::byte>> memory;
  std::vector<StorePiece> pieces;
  Pieces(int rank, int ranks) {
    for (const TestTensor& t : test_tensors()) {
      const std::int64_t n = t.shape.elements();
      const auto cut = [&](int r) { return r == 0 ? 0 : r == ranks ? n : (n * r + 3 * r) / (ranks + 1); };
      Range range{cut(rank), cut(rank + 1)};
      if (t.shape.rank == 1 && ranks > 1)
        range = rank == 0 ? Range{} : Range{n * (rank - 1) / (ranks - 1), n * rank / (ranks - 1)};
      StorePiece piece{t.name, t.kind, t.shape, flat_range_to_boxes(whole(t.shape), range), {}};
      std::vector<std::byte> bytes(static_cast<std::size_t>(range.size()) * size_of(t.dtype));
      for (std::int64_t i = 0; i < range.size(); ++i) {
        const float v = weight_at(range.begin + i);
        if (t.dtype == DType::kF32) reinterpret_cast<float*>(bytes.data())[i] = v;
        if (t.dtype == DType::kBF16) reinterpret_cast<bf16*>(bytes.data())[i] = to_bf16(v);
      }
      memory.push_back(std::move(bytes));
      piece.values = ConstTensorView(memory.back().data(), {range.size()}, t.dtype, Device{});
      pieces.push_back(piece);
    }
  }
};

// A store of pieces that are all in memory. Collective.
inline void write_store(const fs::path& dir, Communicator& world, const std::vector<StorePiece>& pieces,
                        const std::string& metadata_json) {
  std::uint64_t bytes = 0;
  for (const StorePiece& p : pieces) bytes += p.values.bytes();
  StoreWriter writer(dir, world, bytes);
  writer.write(pieces);
  writer.commit(world, metadata_json);
}

inline void write_test_store(const fs::path& dir, int ranks) {
  run_in_threads(ranks, [&](Communicator& world) {
    const Pieces mine(world.rank(), ranks);
    write_store(dir, world, mine.pieces, R"({"step": 7})");
  });
}

template <class T>
std::vector<T> read_box(const ShardStore& store, const TestTensor& t, const Box& box) {
  std::vector<T> out(static_cast<std::size_t>(box.elements()));
  store.read(t.name, t.kind, box, host_view(out.data(), box.extent));
  return out;
}

inline void open_and_verify(const fs::path& dir) {
  ShardStore(dir).verify();
}

inline std::vector<fs::path> files_of(const fs::path& dir) {
  std::vector<fs::path> files;
  for (const auto& e : fs::directory_iterator(dir)) files.push_back(e.path());
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace upmoe::test
