// Stores: any layout in, any layout out, every damaged bit noticed, and a store that is complete or invisible
// whatever happens while it is written.

#include "data/shard_store.h"

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "kernels/core/philox.h"

#ifdef __SANITIZE_THREAD__
extern "C" const char* __tsan_default_options() {  // NOLINT(bugprone-reserved-identifier): its name
  return "die_after_fork=0";                       // children start threads
}
#endif

namespace upmoe {
namespace {

namespace fs = std::filesystem;

std::string slurp(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
void spill(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

class Stores : public testing::Test {
 protected:
  Stores() {
    std::string name = (fs::path(testing::TempDir()) / "stores_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    root = name;
  }
  ~Stores() override { fs::remove_all(root); }
  fs::path root;
};

float weight_at(std::int64_t flat) {
  return static_cast<float>(flat) * 0.37f - 3.0f;
}
// Box and kind of the three tensors of the test; every value is a function of its global position.
struct TestTensor {
  std::string name, kind;
  Shape shape;
  DType dtype;
};
const std::vector<TestTensor>& test_tensors() {
  static const std::vector<TestTensor> all{{"layers.3.moe.down_EDF", "weight", {7, 5, 3}, DType::kBF16},
                                           {"layers.3.moe.down_EDF", "master", {7, 5, 3}, DType::kF32},
                                           {"layers.3.moe.gate_up_EF2D", "m", {3, 4, 2, 5}, DType::kF32},
                                           {"norm_D", "weight", {11}, DType::kF32}};
  return all;
}

std::vector<float> values_of(const Shape& global, const Box& box) {
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

void write_test_store(const fs::path& dir, int ranks) {
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

Box random_box(const Shape& shape, std::uint64_t seed) {
  Box box = whole(shape);
  for (int d = 0; d < shape.rank; ++d) {
    const auto bits = philox(seed, static_cast<std::uint64_t>(d));
    const auto i = static_cast<std::size_t>(d);
    box.offset.dim[i] = bits[0] % shape[d];
    box.extent.dim[i] = bits[1] % (shape[d] - box.offset[d] + 1);
  }
  return box;
}

TEST_F(Stores, AnyBoxFromAnyNumberOfWriters) {
  for (int ranks = 1; ranks <= 4; ++ranks) {
    const fs::path dir = root / fmt::format("step_0000000{}", ranks);
    write_test_store(dir, ranks);
    EXPECT_FALSE(fs::exists(dir.string() + ".tmp"));
    const ShardStore store(dir);
    store.verify();
    EXPECT_EQ(store.metadata_json(), R"({"step":7})");
    EXPECT_EQ(store.tensors().size(), test_tensors().size());
    for (const TestTensor& t : test_tensors()) {
      EXPECT_EQ(store.tensors().at({t.name, t.kind}).shape, t.shape);
      EXPECT_EQ(store.tensors().at({t.name, t.kind}).dtype, t.dtype);
      for (std::uint64_t seed = 0; seed < 200; ++seed) {
        const Box box = seed == 0 ? whole(t.shape) : random_box(t.shape, seed);
        std::vector<float> expected = values_of(t.shape, box);
        std::vector<bf16> rounded;
        for (float& v : expected) rounded.push_back(to_bf16(v));
        if (t.dtype == DType::kBF16)
          for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = to_float(rounded[i]);
        ASSERT_EQ(read_box<float>(store, t, box), expected)
            << ranks << " " << t.name << " " << box.offset.str();
        ASSERT_EQ(read_box<bf16>(store, t, box), rounded);
      }
    }
  }
}

TEST_F(Stores, ReadRefusesWhatIsNotThere) {
  write_test_store(root / "s", 2);
  const ShardStore store(root / "s");
  std::vector<float> out(11);
  EXPECT_THROW(store.read("norm_D", "m", whole(Shape{11}), host_view(out.data(), {11})), Error);
  EXPECT_THROW(store.read("norm", "weight", whole(Shape{11}), host_view(out.data(), {11})), Error);
  EXPECT_THROW(store.read("norm_D", "weight", Box{{1}, {11}}, host_view(out.data(), {11})), Error);
  EXPECT_THROW(store.read("norm_D", "weight", Box{{0}, {10}}, host_view(out.data(), {11})), Error);
  EXPECT_THROW(store.read("norm_D", "weight", Box{{0, 0}, {11, 1}}, host_view(out.data(), {11})), Error);
  std::vector<double> wide(11);
  EXPECT_THROW(store.read("norm_D", "weight", whole(Shape{11}), host_view(wide.data(), {11})), Error);
}

void open_and_verify(const fs::path& dir) {
  ShardStore(dir).verify();
}

std::vector<fs::path> files_of(const fs::path& dir) {
  std::vector<fs::path> files;
  for (const auto& e : fs::directory_iterator(dir)) files.push_back(e.path());
  std::sort(files.begin(), files.end());
  return files;
}

TEST_F(Stores, EveryFlippedBitIsNoticed) {
  write_test_store(root / "s", 2);
  const auto files = files_of(root / "s");
  ASSERT_EQ(files.size(), 4u);  // two shards, index, manifest
  for (const fs::path& file : files) {
    const std::string good = slurp(file);
    for (std::uint64_t k = 0; k < 150; ++k) {
      std::string bad = good;
      const auto bits = philox(k, good.size());
      bad[bits[0] % bad.size()] = static_cast<char>(bad[bits[0] % bad.size()] ^ (1 << (bits[1] % 8)));
      spill(file, bad);
      EXPECT_THROW(open_and_verify(root / "s"), Error) << file << " byte " << bits[0] % bad.size();
    }
    spill(file, good);
    EXPECT_NO_THROW(open_and_verify(root / "s"));
  }
}

TEST_F(Stores, ADamagedShardIsNoticedBeforeItsValuesAreUsed) {
  write_test_store(root / "s", 2);
  const fs::path shard = root / "s" / "shard_00001.h5";
  std::string bytes = slurp(shard);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  spill(shard, bytes);
  const ShardStore store(root / "s");  // sizes are right
  const TestTensor& t = test_tensors()[1];
  EXPECT_THROW(read_box<float>(store, t, whole(t.shape)), Error);
  EXPECT_NO_THROW(read_box<float>(store, t, Box{{0, 0, 0}, {1, 1, 1}}));  // shard 0 is fine
}

TEST_F(Stores, TruncatedGrownAndMissingFiles) {
  write_test_store(root / "s", 3);
  for (const fs::path& file : files_of(root / "s")) {
    const std::string good = slurp(file);
    for (const std::size_t keep : {std::size_t{0}, std::size_t{1}, good.size() / 2, good.size() - 1}) {
      fs::resize_file(file, keep);
      if (file.filename() == "manifest.json" && keep == good.size() - 1) {  // its last newline
        EXPECT_NO_THROW(open_and_verify(root / "s"));
      } else {
        EXPECT_THROW(open_and_verify(root / "s"), Error) << file << " " << keep;
      }
      spill(file, good);
    }
    spill(file, good + "x");
    EXPECT_THROW(open_and_verify(root / "s"), Error) << file;
    fs::remove(file);
    EXPECT_THROW(open_and_verify(root / "s"), Error) << file;
    fs::create_directory(file);
    EXPECT_THROW(open_and_verify(root / "s"), Error) << file;
    fs::remove(file);
    spill(file, good);
  }
}

TEST_F(Stores, GarbledManifests) {
  write_test_store(root / "s", 2);
  for (const std::string text :
       {"", "{", "[]", "null", "{}", "{\"checksum\": -1}", "{\"checksum\": \"x\"}", "{\"checksum\": 1e300}",
        "\xff\xfe", R"({"checksum": 0, "format": "upmoe-store-1", "run": {}, "files": [], "tensors": []})"}) {
    spill(root / "s" / "manifest.json", text);
    try {
      open_and_verify(root / "s");
      ADD_FAILURE() << text;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << text;
      EXPECT_NE(std::string(e.what()).find("manifest"), std::string::npos) << e.what();
    }
  }
  // Deep nesting must not overflow the stack.
  spill(root / "s" / "manifest.json", std::string(200'000, '['));
  EXPECT_THROW(open_and_verify(root / "s"), Error);
}

TEST_F(Stores, LeftoverTmpIsReplacedExistingFolderIsNot) {
  fs::create_directories(root / "s.tmp" / "deep");
  spill(root / "s.tmp" / "shard_00000.h5", "torn");
  spill(root / "s.tmp" / "deep" / "file", "other");
  write_test_store(root / "s", 2);
  EXPECT_NO_THROW(open_and_verify(root / "s"));
  EXPECT_FALSE(fs::exists(root / "s" / "deep"));
  EXPECT_FALSE(fs::exists(root / "s.tmp"));
  EXPECT_THROW(write_test_store(root / "s", 2), Error);
  EXPECT_NO_THROW(open_and_verify(root / "s"));
}

TEST_F(Stores, AnUnwrittenElementIsRefused) {
  EXPECT_THROW(run_in_threads(2,
                              [&](Communicator& world) {
                                Pieces mine(world.rank(), 3);  // the third part is nobody's
                                write_store(root / "s", world, mine.pieces, "{}");
                              }),
               Error);
  EXPECT_FALSE(fs::exists(root / "s"));
  EXPECT_FALSE(fs::exists(root / "s.tmp"));
}

TEST_F(Stores, APeersErrorEndsEverybodysCommit) {
  std::atomic<int> own{0}, peers{0};
  run_in_threads(3, [&](Communicator& world) {
    Pieces mine(world.rank(), 3);
    if (world.rank() == 1) mine.pieces.push_back(mine.pieces.front());  // given twice
    try {
      write_store(root / "s", world, mine.pieces, "{}");
    } catch (const PeerError&) {
      ++peers;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("layers.3.moe.down_EDF"), std::string::npos) << e.what();
      ++own;
    }
  });
  EXPECT_EQ(own, 1);
  EXPECT_EQ(peers, 2);
  EXPECT_TRUE(fs::is_empty(root));
}

// 4 MiB on each of two ranks, into a folder that holds 2 MiB. `announced` as the caller of StoreWriter
// estimates it.
int ranks_that_failed_cleanly(const fs::path& dir, std::uint64_t announced) {
  std::atomic<int> failed{0};
  run_in_threads(2, [&](Communicator& world) {
    const std::vector<float> values(std::size_t{1} << 20, 1.5f);
    const auto n = static_cast<std::int64_t>(values.size());
    const StorePiece piece{
        "w", "weight", {2, n}, {Box{{world.rank(), 0}, {1, n}}}, host_view(values.data(), {n})};
    try {
      StoreWriter writer(dir, world, announced);
      writer.write({piece});
      writer.commit(world, "{}");
    } catch (const Error&) {
      ++failed;
    }
  });
  return failed;
}

TEST_F(Stores, FullDisk) {
  const fs::path full = root / "full";
  fs::create_directory(full);
  if (mount("tmpfs", full.c_str(), "tmpfs", 0, "size=2m") == 0) {
    for (const std::uint64_t announced : {std::uint64_t{0}, std::uint64_t{4} << 20}) {
      EXPECT_EQ(ranks_that_failed_cleanly(full / "step_00000001", announced), 2);
      EXPECT_TRUE(fs::is_empty(full)) << announced;
    }
    EXPECT_EQ(umount(full.c_str()), 0);
  }
}

TEST_F(Stores, FileSizeLimit) {
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{2 << 20, 2 << 20};
    const bool clean = setrlimit(RLIMIT_FSIZE, &limit) == 0 &&
                       ranks_that_failed_cleanly(root / "step_00000001", 0) == 2 && fs::is_empty(root);
    _exit(clean ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_F(Stores, KilledWhileWriting) {
  int complete = 0, absent = 0;
  for (std::uint64_t k = 0; k < 40; ++k) {
    const fs::path dir = root / fmt::format("step_{:08}", k);
    const pid_t child = fork();
    if (child == 0) {
      write_test_store(dir, 2);
      _exit(0);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(philox(k, 1)[0] % 30'000));
    kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    if (fs::exists(dir)) {
      ++complete;
      EXPECT_NO_THROW(open_and_verify(dir)) << k;
    } else {
      ++absent;
      write_test_store(dir, 2);  // whatever was left over does not disturb the next attempt
      EXPECT_NO_THROW(open_and_verify(dir)) << k;
    }
  }
  EXPECT_GT(absent, 0);
  EXPECT_EQ(list_checkpoints(root).size(), 40u);
}

TEST_F(Stores, ListCheckpoints) {
  EXPECT_TRUE(list_checkpoints(root / "nowhere").empty());
  for (const char* name :
       {"step_00000100", "step_00000020", "step_123456789", "step_00000300.tmp", "step_1", "stepp_00000001",
        "step_0000000x", "step_-0000001", "step_999999999999999999999999"}) {
    fs::create_directory(root / name);
    spill(root / name / "manifest.json", "{}");
  }
  fs::create_directory(root / "step_00000400");  // no manifest
  spill(root / "step_00000500", "a file");
  const std::vector<fs::path> expected{root / "step_00000020", root / "step_00000100",
                                       root / "step_123456789"};
  EXPECT_EQ(list_checkpoints(root), expected);
}

// The index maps every element to its place: what h5py sees through it equals what was written.
TEST_F(Stores, IndexReadWithH5py) {
  const char* set = std::getenv("UPMOE_PYTHON");
  const std::string python = set != nullptr ? set : UPMOE_SOURCE_DIR "/.venv/bin/python";
  if (std::system(("'" + python + "' -c 'import h5py' 2>/dev/null").c_str()) != 0)
    GTEST_SKIP() << python << " has no h5py";
  write_test_store(root / "s", 3);
  spill(root / "read.py", R"(import sys, h5py, numpy
index = h5py.File(sys.argv[1] + "/s/index.h5", "r")
for path, shape, rounded in (("/master/layers.3.moe.down_EDF", (7, 5, 3), False),
                             ("/weight/layers.3.moe.down_EDF", (7, 5, 3), True),
                             ("/m/layers.3.moe.gate_up_EF2D", (3, 4, 2, 5), False), ("/weight/norm_D", (11,), False)):
    data = index[path]
    assert data.shape == shape, (path, data.shape)
    found = data.astype("float32")[...]
    flat = numpy.arange(found.size, dtype=numpy.float32)
    expected = (flat * numpy.float32(0.37) - numpy.float32(3.0)).reshape(shape)
    tolerance = 2.0 ** -8 * abs(expected) if rounded else 1e-6 * numpy.maximum(abs(expected), 1)
    assert (abs(found - expected) <= tolerance).all(), (path, found, expected)
)");
  EXPECT_EQ(
      std::system(fmt::format("'{}' '{}' '{}'", python, (root / "read.py").string(), root.string()).c_str()),
      0);
}

TEST(Crc32c, CheckValues) {
  const std::string zeros(32, '\0'), ones(32, '\xff'), digits = "123456789";
  EXPECT_EQ(crc32c(zeros.data(), 32), 0x8a9136aau);
  EXPECT_EQ(crc32c(ones.data(), 32), 0x62a8ab43u);
  EXPECT_EQ(crc32c(digits.data(), 9), 0xe3069283u);
  EXPECT_EQ(crc32c(nullptr, 0), 0u);
  for (std::size_t cut = 0; cut <= 9; ++cut)  // in pieces
    EXPECT_EQ(crc32c(digits.data() + cut, 9 - cut, crc32c(digits.data(), cut)), 0xe3069283u);
}

}  // namespace
}  // namespace upmoe
