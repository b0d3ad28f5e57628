// Stores: any layout in, any layout out, every damaged bit noticed.

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "data/checkpoint_folder.h"
#include "data/crc.h"
#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"
#include "tests/data/stores.h"

namespace upmoe::test {
namespace {

// Six numbers handed over later.
StorePiece in_blocks(const std::string& name) {
  return {name, "weight", {6}, {whole(Shape{6})}, ConstTensorView(nullptr, {6}, DType::kF32, Device{})};
}

// Takes the values out of every second piece, or of all, and hands them over from the back, `step` elements
// at a time.
void write_in_blocks(StoreWriter& writer, const std::vector<StorePiece>& given, bool all, std::int64_t step) {
  std::vector<StorePiece> pieces = given;
  for (std::size_t i = 0; i < pieces.size(); ++i)
    if (all || i % 2 == 0) pieces[i].values.data = nullptr;
  writer.write(pieces, [&](const PutBlock& put) {
    for (std::size_t i = pieces.size(); i-- > 0;) {
      if (pieces[i].values.data != nullptr) continue;
      const ConstTensorView& values = given[i].values;
      for (std::int64_t end = values.elements(); end > 0; end -= step) {
        const Range r{std::max<std::int64_t>(0, end - step), end};
        const ConstTensorView rows = values.rows(r.begin, r.end);
        put({i, r}, {rows.data, rows.bytes()});
      }
    }
  });
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
        const Box box = seed == 0 ? whole(t.shape) : random_box(t.shape, seed, 0);
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

TEST_F(Stores, EveryFlippedBitIsNoticed) {
  write_test_store(root / "s", 2);
  const auto files = files_of(root / "s");
  ASSERT_EQ(files.size(), 4u);  // two shards, index, manifest
  for (const fs::path& file : files) {
    const std::string good = read_file(file);
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
  std::string bytes = read_file(shard);
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
    const std::string good = read_file(file);
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

// The share of a rank handed over in blocks of any order gives the files of the share given at once.
TEST_F(Stores, BlocksGiveTheSameFiles) {
  write_test_store(root / "whole", 3);
  for (const std::int64_t step : {1, 4, 1000}) {
    const fs::path dir = root / fmt::format("blocks{}", step);
    run_in_threads(3, [&](Communicator& world) {
      const Pieces mine(world.rank(), 3);
      const bool all_in_blocks = world.rank() != 1;  // the other one mixes both ways
      StoreWriter writer(dir, world, 0);
      write_in_blocks(writer, mine.pieces, all_in_blocks, step);
      writer.commit(world, R"({"step": 7})");
    });
    for (const fs::path& file : files_of(root / "whole"))
      EXPECT_EQ(read_file(dir / file.filename()), read_file(file)) << step << " " << file;
    EXPECT_NO_THROW(open_and_verify(dir));
  }
}

// No time of day and no leftovers of memory: what is the same in the store is the same in its files.
TEST_F(Stores, TheSameTensorsAreTheSameFilesAtAnyTime) {
  write_test_store(root / "now", 2);
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  write_test_store(root / "later", 2);
  for (const fs::path& file : files_of(root / "now"))
    EXPECT_EQ(read_file(root / "later" / file.filename()), read_file(file)) << file;
}

// Long enough to be written past the page cache: in aligned blocks, and in such that lie askew in memory or
// in the file.
TEST_F(Stores, LongPiecesInAlignedAndOtherBlocks) {
  const std::int64_t n = (std::int64_t{3} << 20) / 4 + 5;
  std::vector<float> values(static_cast<std::size_t>(n) + 1024 + 1);
  std::size_t first = 0;
  while (reinterpret_cast<std::uintptr_t>(values.data() + first) % 4096 != 0) ++first;
  for (std::int64_t i = 0; i < n; ++i) values[first + static_cast<std::size_t>(i)] = weight_at(i);
  for (const std::int64_t step : {std::int64_t{1} << 18, std::int64_t{1} << 10, std::int64_t{3333}, n}) {
    const auto self = make_self_communicator();
    StorePiece piece = in_blocks("a");
    piece.global = {n};
    piece.boxes = {whole(piece.global)};
    piece.values = ConstTensorView(nullptr, {n}, DType::kF32, Device{});
    StorePiece short_one = in_blocks("0");
    StoreWriter writer(root / "s", *self, 0);
    writer.write({short_one, piece}, [&](const PutBlock& put) {
      for (std::int64_t at = 0; at < n; at += step) {
        const Range r{at, std::min(n, at + step)};
        put({1, r}, std::as_bytes(std::span(values).subspan(first + static_cast<std::size_t>(at),
                                                            static_cast<std::size_t>(r.size()))));
      }
      put({0, {0, 6}}, std::as_bytes(std::span(values).subspan(first, 6)));
    });
    writer.commit(*self, "{}");
    const ShardStore store(root / "s");
    store.verify();
    const TestTensor long_one{"a", "weight", {n}, DType::kF32};
    EXPECT_EQ(read_box<float>(store, long_one, whole(long_one.shape)),
              std::vector<float>(values.begin() + static_cast<std::ptrdiff_t>(first),
                                 values.begin() + static_cast<std::ptrdiff_t>(first) + n))
        << step;
    fs::remove_all(root / "s");
  }
}

TEST_F(Stores, EveryElementIsHandedOverOnce) {
  using Blocks = std::vector<Range>;  // of 6 elements
  const std::vector<std::pair<Blocks, bool>> cases{{{{0, 6}}, true},
                                                   {{{4, 6}, {0, 4}}, true},
                                                   {{{0, 0}, {0, 6}, {6, 6}}, true},
                                                   {{}, false},
                                                   {{{0, 5}}, false},
                                                   {{{1, 6}}, false},
                                                   {{{0, 2}, {3, 6}}, false},
                                                   {{{0, 4}, {3, 6}}, false},
                                                   {{{0, 6}, {0, 6}}, false},
                                                   {{{0, 6}, {2, 3}}, false},
                                                   {{{0, 7}}, false},
                                                   {{{-1, 6}}, false}};
  for (const auto& [blocks, good] : cases) {
    const auto self = make_self_communicator();
    StoreWriter writer(root / "s", *self, 0);
    const std::vector<float> values(8, 1.0f);
    writer.write({in_blocks("a"), in_blocks("b")}, [&](const PutBlock& put) {
      put({1, {0, 6}}, std::as_bytes(std::span(values).first(6)));
      for (const Range& r : blocks)
        put({0, r}, std::as_bytes(std::span(values).first(static_cast<std::size_t>(r.size()))));
    });
    if (good) {
      writer.commit(*self, "{}");
      fs::remove_all(root / "s");
    } else {
      EXPECT_THROW(writer.commit(*self, "{}"), Error);
    }
  }
}

TEST_F(Stores, WhatTheProducerThrowsIsToldByEveryRank) {
  std::atomic<int> own{0}, peers{0};
  run_in_threads(3, [&](Communicator& world) {
    try {
      StoreWriter writer(root / "s", world, 0);
      writer.write({}, [&](const PutBlock&) {
        if (world.rank() == 2) fail(ExitCode::kUsage, "no values");
      });
      writer.commit(world, "{}");
    } catch (const PeerError& e) {
      peers += e.code() == ExitCode::kUsage ? 1 : 0;
    } catch (const Error& e) {
      own += e.code() == ExitCode::kUsage && std::string(e.what()) == "no values" ? 1 : 0;
    }
  });
  EXPECT_EQ(own, 1);
  EXPECT_EQ(peers, 2);
  EXPECT_TRUE(fs::is_empty(root));
}

// A block that changes between the write and the reading back is noticed by its checksum alone.
TEST_F(Stores, BlocksAreComparedWithTheFile) {
  const auto self = make_self_communicator();
  StoreWriter writer(root / "s", *self, 0);
  const std::vector<float> values(6, 1.5f);
  writer.write({in_blocks("a")}, [&](const PutBlock& put) {
    put({0, {0, 6}}, std::as_bytes(std::span(values)));
    const fs::path shard = root / "s.tmp" / "shard_00000.h5";
    std::string bytes = read_file(shard);
    const std::size_t at = bytes.find(std::string(reinterpret_cast<const char*>(values.data()), 24));
    ASSERT_NE(at, std::string::npos);
    std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(at) + 11).put('!');
  });
  EXPECT_THROW(writer.commit(*self, "{}"), Error);
  EXPECT_FALSE(fs::exists(root / "s"));
}

TEST_F(Stores, CheckpointFolders) {
  EXPECT_TRUE(checkpoint_folders(root / "nowhere").empty());
  for (const char* name :
       {"step_00000100", "step_00000020", "step_123456789", "step_00000300.tmp", "step_1", "stepp_00000001",
        "step_0000000x", "step_-0000001", "step_999999999999999999999999"}) {
    fs::create_directory(root / name);
    spill(root / name / "manifest.json", "{}");
  }
  fs::create_directory(root / "step_00000400");  // whatever it holds
  spill(root / "step_00000500", "a file");
  const std::vector<fs::path> expected{root / "step_00000020", root / "step_00000100", root / "step_00000400",
                                       root / "step_123456789"};
  EXPECT_EQ(checkpoint_folders(root), expected);
}

// The index maps every element to its place: what h5py sees through it equals what was written.
TEST_F(Stores, IndexReadWithH5py) {
  const char* set = std::getenv("UPMOE_PYTHON");
  const std::string python = set != nullptr ? set : UPMOE_SOURCE_DIR "/.venv/bin/python";
  ASSERT_EQ(std::system(("'" + python + "' -c 'import h5py'").c_str()), 0)
      << "launch/setup.sh makes .venv; UPMOE_PYTHON names another Python with h5py";
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
}  // namespace upmoe::test
