// Upcycling into a checkpoint: the values of the Hugging Face form for any number of ranks, threads and any
// block length, and nothing left behind when it cannot be finished.

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <atomic>
#include <csignal>
#include <fstream>

#include "data/hf_writer.h"
#include "data/model_source.h"
#include "data/shard_store.h"
#include "parallel/thread_comm.h"
#include "tests/support/read_file.h"
#include "tests/support/tiny_dense.h"
#include "upcycle/upcycler.h"

#ifdef __SANITIZE_THREAD__
extern "C" const char* __tsan_default_options() {  // NOLINT(bugprone-reserved-identifier): its name
  return "die_after_fork=0";                       // children start threads
}
#endif

namespace upmoe {
namespace {

using namespace test;
namespace fs = std::filesystem;

// Every tensor on disk as export writes it.
std::map<std::string, std::vector<std::byte>> tensor_bytes(const fs::path& dir) {
  std::map<std::string, std::vector<std::byte>> all;
  const HfModel model(dir);
  for (const SafetensorsEntry* entry : model.tensors()) {
    const auto [file, found] = model.locate(entry->name);
    std::vector<std::byte>& bytes = all[entry->name];
    bytes.resize(found->end - found->begin);
    file->read(*found, 0, bytes);
  }
  return all;
}

class CheckpointForm : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_dense(dense_, shape_); }

  UpcycleOptions options(const std::string& name, OutputForm form = OutputForm::kCheckpoint) const {
    UpcycleOptions o;
    o.from = dense_;
    o.to = dir_.path() / name;
    o.form = form;
    o.threads = 2;
    o.piece_bytes = 4096;
    o.error_tokens = 4;
    o.progress = false;
    return o;
  }
  static UpcycleConfig recipe() {
    UpcycleConfig c = tiny_recipe();
    c.experts.reinit = 0.5;
    return c;
  }
  void run(const UpcycleConfig& config, const UpcycleOptions& o, int ranks) const {
    run_in_threads(ranks, [&](Communicator& comm) { upcycle(config, o, comm); });
  }
  // Ranks that ended with an Error.
  int refusals(const UpcycleOptions& o, int ranks, ExitCode code, std::string* message = nullptr) const {
    std::atomic<int> count{0};
    run_in_threads(ranks, [&](Communicator& comm) {
      try {
        upcycle(recipe(), o, comm);
      } catch (const Error& e) {
        if (e.code() == code) ++count;
        if (message != nullptr && comm.rank() == 0) *message = e.what();
      }
    });
    return count;
  }
  // Both forms of one recipe, and the checkpoint exported again: the same tensors in all of them.
  void compare_forms(const UpcycleConfig& config, int ranks, std::uint64_t piece_bytes) const {
    const std::string name = fmt::format("{}_{}_{}", shape_.ffn, ranks, piece_bytes);
    const UpcycleOptions plain = options(name + "_hf", OutputForm::kHuggingFace);
    UpcycleOptions o = options(name);
    o.piece_bytes = piece_bytes;
    o.threads = ranks;
    run(config, plain, 1);
    run(config, o, ranks);
    ShardStore(o.to).verify();
    const auto made = open_model(o.to);
    EXPECT_EQ(function_of(config_of_model(o.to)), function_of(made->config())) << name;
    const fs::path exported = dir_.path() / (name + "_exported");
    write_hf_model(
        {.dir = exported, .companions = made->companions(), .inputs = {o.to}, .dtype = shape_.dtype},
        made->config(),
        [&](const ParamSpec& p, const Box& part, TensorView out) { made->read(p, part, out); });
    EXPECT_EQ(tensor_bytes(exported), tensor_bytes(plain.to)) << name;
    for (const char* file : {"config.json", "upcycle_report.json", "tokenizer.json"})
      EXPECT_EQ(read_file(o.to / file), read_file(plain.to / file)) << name << " " << file;
    EXPECT_EQ(read_file(exported / "tokenizer.json"), read_file(plain.to / "tokenizer.json"));
    for (const fs::path& made_here : {plain.to, o.to, exported}) fs::remove_all(made_here);
  }

  TinyShape shape_;
  TemporaryDirectory dir_;
  fs::path dense_ = dir_.path() / "dense";
};

TEST_F(CheckpointForm, HoldsTheTensorsOfTheDirectoryForAnyNumberOfRanks) {
  for (const int ranks : {1, 2, 3, 5})
    for (const std::uint64_t piece_bytes :
         {std::uint64_t{4096}, std::uint64_t{3} << 14, std::uint64_t{8} << 20})
      compare_forms(recipe(), ranks, piece_bytes);
}

TEST_F(CheckpointForm, OtherRecipes) {
  UpcycleConfig c = recipe();
  c.seed = 7;
  c.experts.reinit_from = ReinitFrom::kConfig;
  c.experts.reinit_sets = ReinitSets::kPerMatrix;
  c.router.method = RouterMethod::kUniform;
  compare_forms(c, 2, 4096);
  c = tiny_recipe();  // no shared expert, nothing redrawn, the rest drawn anew
  c.target.shared_expert_intermediate_size = 0;
  c.shared.method = SharedMethod::kNone;
  c.experts.noise = 0.01;
  c.keep_rest = false;
  compare_forms(c, 3, 4096);
  c = tiny_recipe();
  c.experts.method = ExpertMethod::kRandom;
  c.shared.method = SharedMethod::kShuffle;
  compare_forms(c, 2, 4096);
  c = tiny_recipe();  // halves of whole copies, routed in groups
  c.target = {.num_experts = 8,
              .num_experts_per_tok = 2,
              .moe_intermediate_size = 43,
              .shared_expert_intermediate_size = 0,
              .norm_topk_prob = false};
  c.experts.method = ExpertMethod::kVirtualGroup;
  c.shared.method = SharedMethod::kNone;
  c.router.method = RouterMethod::kVirtualGroup;
  compare_forms(c, 3, 4096);
}

// Buffers begin at zero, in fp32 beside weights in bf16.
TEST_F(CheckpointForm, RoutersWithBiases) {
  shape_ = {.dtype = DType::kBF16, .family = "qwen3"};
  fs::remove_all(dense_);
  write_tiny_dense(dense_, shape_);
  UpcycleConfig c = tiny_recipe();
  c.target = {.num_experts = 8,
              .num_experts_per_tok = 2,
              .moe_intermediate_size = 43,
              .shared_expert_intermediate_size = 86,
              .norm_topk_prob = true,
              .family = "dots1"};
  c.experts.method = ExpertMethod::kVirtualGroup;
  for (const int ranks : {1, 3}) compare_forms(c, ranks, 4096);
  const UpcycleOptions o = options("hf", OutputForm::kHuggingFace);
  run(c, o, 2);
  const HfModel made(o.to);
  const ParamSpec bias = make_param(made.config(), Role::kRouterBias, 1);
  std::vector<float> values(8, 1.0f);
  made.read(bias, whole(bias.shape), host_view(values.data(), bias.shape));
  EXPECT_EQ(values, std::vector<float>(8, 0.0f));
}

TEST_F(CheckpointForm, Bf16TiedEmbeddingsAndOddSizes) {
  for (const auto& [ffn, experts, width, shared] :
       {std::array{86, 60, 22, 88}, std::array{13, 7, 5, 17}, std::array{1, 3, 1, 1}}) {
    shape_ = {.hidden = 16, .ffn = ffn, .layers = 1, .vocab = 17, .dtype = DType::kBF16, .tied = true};
    fs::remove_all(dense_);
    write_tiny_dense(dense_, shape_);
    UpcycleConfig c = recipe();
    c.target.num_experts = experts;
    c.target.num_experts_per_tok = 3;
    c.target.moe_intermediate_size = width;
    c.target.shared_expert_intermediate_size = shared;
    for (const int ranks : {1, 3}) compare_forms(c, ranks, 4096);
  }
}

TEST_F(CheckpointForm, OneShardOfEqualLengthForEachRank) {
  const UpcycleOptions o = options("moe");
  run(recipe(), o, 3);
  std::uint64_t least = ~std::uint64_t{0}, most = 0;
  for (int rank = 0; rank < 3; ++rank) {
    const std::uint64_t bytes = fs::file_size(o.to / fmt::format("shard_{:05}.h5", rank));
    least = std::min(least, bytes);
    most = std::max(most, bytes);
  }
  EXPECT_LT(most - least, most / 10);  // HDF5's own bytes weigh something in files this small
  EXPECT_FALSE(fs::exists(o.to / "shard_00003.h5"));
}

TEST_F(CheckpointForm, TokenizerOfTheSourceWhereNoneWasCarriedAlong) {
  fs::remove(dense_ / "tokenizer.json");
  run(recipe(), options("moe"), 1);
  EXPECT_EQ(open_model(dir_.path() / "moe")->companions(), fs::absolute(dense_));
}

TEST_F(CheckpointForm, RefusesAnOutputThatExists) {
  const UpcycleOptions o = options("moe");
  fs::create_directory(o.to);
  std::ofstream(o.to / "precious") << "1";
  EXPECT_EQ(refusals(o, 2, ExitCode::kUsage), 2);
  EXPECT_EQ(read_file(o.to / "precious"), "1");
  fs::remove(o.to / "precious");
  run(recipe(), o, 2);  // empty: fine
  EXPECT_EQ(refusals(o, 2, ExitCode::kUsage), 2);
  ShardStore(o.to).verify();
  EXPECT_FALSE(fs::exists(o.to.string() + ".upmoe-partial"));
}

TEST_F(CheckpointForm, NobodyElsesFolderIsTouched) {
  const UpcycleOptions o = options("moe");
  for (const char* suffix : {".tmp", ".upmoe-partial"}) {
    fs::create_directory(o.to.string() + suffix);
    std::ofstream(fs::path(o.to.string() + suffix) / "shard_00007.h5") << "mine";
  }
  EXPECT_EQ(refusals(o, 2, ExitCode::kUsage), 2);  // no run of ours left it
  EXPECT_EQ(read_file(fs::path(o.to.string() + ".upmoe-partial") / "shard_00007.h5"), "mine");
  fs::remove_all(o.to.string() + ".upmoe-partial");
  run(recipe(), o, 2);
  EXPECT_EQ(read_file(fs::path(o.to.string() + ".tmp") / "shard_00007.h5"), "mine");
}

TEST_F(CheckpointForm, TellsOfTooLittleDiskBeforeTheFirstByte) {
  UpcycleOptions o = options("moe");
  o.free_space = [](const fs::path&) { return std::uint64_t{123'456}; };
  std::string message;
  EXPECT_EQ(refusals(o, 2, ExitCode::kBadInput, &message), 2);
  EXPECT_NE(message.find("123456 bytes"), std::string::npos) << message;
  EXPECT_FALSE(fs::exists(o.to));
  EXPECT_FALSE(fs::exists(o.to.string() + ".upmoe-partial"));
}

// One rank fails after another has begun to write: its random inputs for a layer's error are minus one.
TEST_F(CheckpointForm, ARankThatFailsLeavesNothing) {
  const UpcycleOptions good = options("moe");
  for (const int failing : {1, 2}) {  // each holds the last expert matrix of a layer
    std::atomic<int> failed{0};
    run_in_threads(3, [&](Communicator& comm) {
      UpcycleOptions o = good;
      if (comm.rank() == failing) o.error_tokens = -1;
      try {
        upcycle(recipe(), o, comm);
      } catch (const Error&) {
        ++failed;
      }
    });
    EXPECT_EQ(failed, 3) << failing;
    EXPECT_FALSE(fs::exists(good.to));
    EXPECT_FALSE(fs::exists(good.to.string() + ".upmoe-partial"));
  }
  run(recipe(), good, 3);
}

// What the disk refuses while the shards are written, though there was room when it was asked.
TEST_F(CheckpointForm, AWriteThatFailsLeavesNothing) {
  const UpcycleOptions o = options("moe");
  const pid_t child = fork();
  if (child == 0) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100'000, 100'000};
    const bool clean = setrlimit(RLIMIT_FSIZE, &limit) == 0 && refusals(o, 3, ExitCode::kBadInput) == 3 &&
                       !fs::exists(o.to) && !fs::exists(o.to.string() + ".upmoe-partial");
    _exit(clean ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST_F(CheckpointForm, AFullDiskLeavesNothing) {
  const fs::path disk = dir_.path() / "disk";
  fs::create_directory(disk);
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=12m") != 0) GTEST_SKIP() << "no tmpfs can be mounted";
  UpcycleOptions o = options("disk/moe");
  run(recipe(), o, 1);
  const std::uint64_t bytes = fs::file_size(o.to / "shard_00000.h5");
  fs::remove_all(o.to);
  std::ofstream(disk / "hog") << std::string(fs::space(disk).available - bytes / 2, 'x');
  o.free_space = [](const fs::path&) { return ~std::uint64_t{0}; };
  EXPECT_EQ(refusals(o, 3, ExitCode::kBadInput), 3);
  EXPECT_FALSE(fs::exists(o.to));
  EXPECT_FALSE(fs::exists(o.to.string() + ".upmoe-partial"));
  EXPECT_EQ(umount(disk.c_str()), 0);
}

TEST_F(CheckpointForm, PlanSaysWhatIsMade) {
  const std::string plan = plan_upcycle(recipe(), options("moe")).text;
  EXPECT_NE(plan.find("a checkpoint of one shard per rank"), std::string::npos) << plan;
}

}  // namespace
}  // namespace upmoe
