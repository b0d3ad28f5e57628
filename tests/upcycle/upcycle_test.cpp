// Whole directories: the same bytes for any number of ranks and threads, what the report says, and bad input.

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "data/crc.h"
#include "parallel/thread_comm.h"
#include "tests/support/read_file.h"
#include "tests/support/tiny_dense.h"
#include "upcycle/upcycler.h"

namespace upmoe {
namespace {

using namespace test;
namespace fs = std::filesystem;

std::map<std::string, std::string> files_in(const fs::path& dir) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(dir))
    files[entry.path().filename().string()] = read_file(entry.path());
  return files;
}

// What an upcycling run that must fail says; checks as well that nothing is left behind.
struct Refusal {
  ExitCode code = ExitCode::kDone;
  std::string message;
};

class Upcycle : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_dense(dense_, shape_); }

  UpcycleOptions options(const std::string& name = "moe") const {
    UpcycleOptions o;
    o.from = dense_;
    o.to = dir_.path() / name;
    o.threads = 1;
    o.max_shard_bytes = 300'000;
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
  void run(const UpcycleConfig& config, const UpcycleOptions& o, int ranks = 1) const {
    run_in_threads(ranks, [&](Communicator& comm) { upcycle(config, o, comm); });
  }
  Refusal refusal(const UpcycleConfig& config, const UpcycleOptions& o, int ranks = 2) const {
    Refusal found;
    try {
      run(config, o, ranks);
      ADD_FAILURE() << "was not refused";
    } catch (const Error& e) {
      found = {e.code(), e.what()};
    }
    EXPECT_FALSE(fs::exists(o.to.string() + ".upmoe-partial"));
    return found;
  }

  TinyShape shape_;
  TemporaryDirectory dir_;
  fs::path dense_ = dir_.path() / "dense";
};

TEST_F(Upcycle, BytesAreTheSameForAnyNumberOfRanksAndThreads) {
  UpcycleOptions o = options("one");
  run(recipe(), o);
  const auto one = files_in(o.to);
  EXPECT_GT(
      std::count_if(one.begin(), one.end(), [](const auto& f) { return f.first.ends_with(".safetensors"); }),
      2);
  for (const int ranks : {2, 3, 4}) {
    for (const int threads : {1, 3}) {
      o = options(fmt::format("ranks{}_{}", ranks, threads));
      o.threads = threads;
      o.piece_bytes = 4096 * static_cast<std::uint64_t>(ranks);
      run(recipe(), o, ranks);
      EXPECT_EQ(files_in(o.to), one) << ranks << " ranks, " << threads << " threads";
    }
  }
}

TEST_F(Upcycle, SeedChangesTheBytes) {
  run(recipe(), options("a"));
  UpcycleConfig other = recipe();
  other.seed = 2;
  run(other, options("b"));
  EXPECT_NE(files_in(dir_.path() / "a"), files_in(dir_.path() / "b"));
}

TEST_F(Upcycle, OutputIsAMixtureWithEveryTensorOfTheRecipe) {
  run(recipe(), options(), 2);
  const HfModel made(dir_.path() / "moe");  // checks names, shapes and types against the configuration
  EXPECT_EQ(made.config().num_experts, 60);
  EXPECT_EQ(made.config().num_experts_per_tok, 4);
  EXPECT_EQ(made.config().moe_intermediate_size, 22);
  EXPECT_EQ(made.config().shared_expert_intermediate_size, 88);
  EXPECT_EQ(made.config().intermediate_size, 88);
  const auto json = nlohmann::json::parse(read_file(dir_.path() / "moe" / "config.json"));
  EXPECT_EQ(json.at("architectures"), nlohmann::json::array({"Qwen2MoeForCausalLM"}));
  EXPECT_EQ(json.at("model_type"), "qwen2_moe");
  EXPECT_EQ(json.at("torch_dtype"), "float32");
  EXPECT_EQ(json.at("sliding_window"), 64);  // carried through
  EXPECT_EQ(read_file(dir_.path() / "moe" / "tokenizer.json"), read_file(dense_ / "tokenizer.json"));

  const TinySource source(dense_);
  const NaiveTensors expected = source.make(make_recipe(recipe(), source.config()));
  ASSERT_EQ(made.tensors().size(), expected.size());
  for (const auto& [name, values] : expected) {
    const auto [file, entry] = made.locate(name);
    std::vector<std::byte> bytes(entry->end - entry->begin);
    file->read(*entry, 0, bytes);
    ASSERT_EQ(to_doubles(bytes, DType::kF32), values) << name;
  }
}

// A layer that stays dense is the dense model's, its width included; the report speaks of mixtures alone.
TEST_F(Upcycle, LayersThatStayDenseAreCopied) {
  UpcycleConfig c = recipe();
  c.target.layers = {LayerChoice::Kind::kFirstDense, 1, {}};
  run(c, options());
  const HfModel made(dir_.path() / "moe");
  EXPECT_EQ(made.config().mlp_only_layers, std::vector<int>{0});
  EXPECT_EQ(made.config().intermediate_size, shape_.ffn);
  const TinySource source(dense_);
  for (const char* matrix : {"gate_proj", "up_proj", "down_proj"}) {
    const std::string name = fmt::format("model.layers.0.mlp.{}.weight", matrix);
    const auto [file, entry] = made.locate(name);
    std::vector<std::byte> bytes(entry->end - entry->begin);
    file->read(*entry, 0, bytes);
    EXPECT_EQ(to_doubles(bytes, DType::kF32), source.read(name));
  }
  const auto report = nlohmann::json::parse(read_file(dir_.path() / "moe" / "upcycle_report.json"));
  ASSERT_EQ(report.at("layers").size(), 1u);
  EXPECT_EQ(report.at("layers")[0].at("layer"), 1);
  EXPECT_GT(report.at("layers")[0].at("relative_error"), 0.0);
  const UpcycleConfig resolved = parse_upcycle_config(report.at("recipe").get<std::string>(), "report", {});
  EXPECT_EQ(resolved.target.layers, c.target.layers);
  EXPECT_EQ(resolved.target.family, "qwen2_moe");
  EXPECT_EQ(resolved.shared.gate, SharedGate::kSigmoid);
}

TEST_F(Upcycle, WorksForBf16TiedEmbeddingsAndOddSizes) {
  for (const auto& [ffn, experts, width, shared] :
       {std::array{86, 60, 22, 88}, std::array{13, 7, 5, 17}, std::array{1, 3, 1, 1}}) {
    shape_ = {.hidden = 16, .ffn = ffn, .layers = 1, .vocab = 17, .dtype = DType::kBF16, .tied = true};
    const fs::path dense = dir_.path() / fmt::format("dense{}", ffn);
    write_tiny_dense(dense, shape_);
    UpcycleOptions o = options(fmt::format("moe{}", ffn));
    o.from = dense;
    UpcycleConfig c = recipe();
    c.target.num_experts = experts;
    c.target.num_experts_per_tok = 3;
    c.target.moe_intermediate_size = width;
    c.target.shared_expert_intermediate_size = shared;
    run(c, o, 3);
    const HfModel made(o.to);
    EXPECT_EQ(made.config().dtype, FileDType::kBf16);
    EXPECT_EQ(made.config().num_experts, experts);
  }
}

TEST_F(Upcycle, ReportTellsWhatWasDone) {
  run(recipe(), options());
  const auto report = nlohmann::json::parse(read_file(dir_.path() / "moe" / "upcycle_report.json"));
  const std::string dense = read_file(dense_ / "model.safetensors");
  EXPECT_EQ(report.at("source").at("files").at(0).at("crc32c"),
            fmt::format("{:08x}", crc32c(dense.data(), dense.size())));
  EXPECT_EQ(report.at("seed"), 1);
  const UpcycleConfig resolved = parse_upcycle_config(report.at("recipe").get<std::string>(), "report", {});
  EXPECT_EQ(resolved.experts.copies, 16);  // 60 * 22 = 1320 of 86
  EXPECT_EQ(resolved.experts.scale, 1.0);
  ASSERT_EQ(report.at("layers").size(), 2u);
  for (const auto& layer : report.at("layers")) {
    EXPECT_EQ(layer.at("copies_min"), 15);
    EXPECT_EQ(layer.at("copies_max"), 16);
    EXPECT_EQ(layer.at("redrawn_neurons_per_expert"), 11);
    EXPECT_EQ(layer.at("redrawn_neurons"), 660);
    EXPECT_EQ(layer.at("scale"), 1.0);
    EXPECT_GT(layer.at("relative_error"), 1e-4);
    EXPECT_LT(layer.at("relative_error"), 0.2);
  }
}

TEST_F(Upcycle, RefusesOutputThatOverlapsTheSourceOrExists) {
  UpcycleOptions o = options();
  for (const fs::path& to : {dense_, dense_ / "moe", dense_ / "x" / ".." / "moe", dir_.path()}) {
    o.to = to;
    const Refusal r = refusal(recipe(), o);
    EXPECT_EQ(r.code, ExitCode::kUsage) << to;
  }
  o = options();
  o.from = dir_.path() / "moe.upmoe-partial";  // where the output would be prepared
  fs::rename(dense_, o.from);
  try {
    run(recipe(), o);
    ADD_FAILURE() << "was not refused";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
  }
  EXPECT_TRUE(fs::exists(o.from / "model.safetensors"));
  fs::rename(o.from, dense_);

  o = options();
  fs::create_directory(o.to);
  std::ofstream(o.to / "precious") << "1";
  EXPECT_EQ(refusal(recipe(), o).code, ExitCode::kUsage);
  EXPECT_TRUE(fs::exists(o.to / "precious"));
  fs::remove(o.to / "precious");
  run(recipe(), o);  // empty: fine
  EXPECT_TRUE(fs::exists(o.to / "config.json"));
}

TEST_F(Upcycle, NobodyElsesFolderIsTouched) {
  const UpcycleOptions o = options();
  const fs::path tmp = o.to.string() + ".tmp";
  fs::create_directory(tmp);
  std::ofstream(tmp / "model-00001-of-00009.safetensors") << "mine";
  run(recipe(), o);
  EXPECT_EQ(read_file(tmp / "model-00001-of-00009.safetensors"), "mine");
}

struct RawTensor {
  SafetensorsEntry entry;
  std::string data;
};

// model.safetensors again, after `change`.
void rewrite(const fs::path& dir, const std::function<void(std::vector<RawTensor>&)>& change) {
  std::vector<RawTensor> tensors;
  {
    const SafetensorsFile file(dir / "model.safetensors");
    for (const SafetensorsEntry& e : file.header().entries) {
      tensors.push_back({e, std::string(e.end - e.begin, 0)});
      file.read(e, 0, std::as_writable_bytes(std::span(tensors.back().data)));
    }
  }
  change(tensors);
  std::vector<SafetensorsEntry> entries;
  for (const RawTensor& t : tensors) entries.push_back(t.entry);
  std::ofstream out(dir / "model.safetensors", std::ios::binary);
  out << make_safetensors_header(entries, {{"format", "pt"}});
  for (const RawTensor& t : tensors) out << t.data;
}

TEST_F(Upcycle, OnlyTensorsThatAreUsedAreChecked) {
  shape_.dtype = DType::kBF16;
  fs::remove_all(dense_);
  write_tiny_dense(dense_, shape_);
  run(recipe(), options("plain"));
  rewrite(dense_, [](std::vector<RawTensor>& tensors) {
    const std::string nan("\0\0\xc0\x7f", 4);
    tensors.push_back({{"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {1}, 0, 0}, nan});
    tensors.push_back({{"model.layers.1.self_attn.rotary_emb.inv_freq", "I64", {1}, 0, 0}, nan + nan});
  });
  run(recipe(), options("with_frequencies"), 2);
  const auto plain = files_in(dir_.path() / "plain"), with = files_in(dir_.path() / "with_frequencies");
  for (const auto& [name, bytes] : plain) {
    if (name == "upcycle_report.json") continue;  // it has the checksum of the source
    EXPECT_EQ(bytes, with.at(name)) << name;
  }
}

TEST_F(Upcycle, ARefusalOfElementTypesNamesTheCure) {
  shape_.dtype = DType::kBF16;
  fs::remove_all(dense_);
  write_tiny_dense(dense_, shape_);
  rewrite(dense_, [](std::vector<RawTensor>& tensors) {
    for (RawTensor& t : tensors)
      if (t.entry.name == "model.norm.weight") {
        t.entry.dtype = "F32";
        t.data.resize(2 * t.data.size());
      }
  });
  Refusal r = refusal(recipe(), options());
  EXPECT_EQ(r.code, ExitCode::kBadInput);
  for (const char* part : {"BF16", "1 F32 (model.norm.weight)", "upmoe export", "--dtype fp32"})
    EXPECT_NE(r.message.find(part), std::string::npos) << r.message;
  write_tiny_dense(dense_, shape_);
  rewrite(dense_, [](std::vector<RawTensor>& tensors) {
    for (RawTensor& t : tensors) t.entry.dtype = "F16";
  });
  r = refusal(recipe(), options());
  EXPECT_NE(r.message.find("F16"), std::string::npos) << r.message;
  EXPECT_NE(r.message.find("upmoe export"), std::string::npos) << r.message;
}

TEST_F(Upcycle, WithoutASharedExpertTheDirectoryIsWhatTransformersWrites) {
  UpcycleConfig c = recipe();
  c.target.shared_expert_intermediate_size = 0;
  c.shared.method = SharedMethod::kNone;
  run(c, options("one"), 1);
  run(c, options("three"), 3);
  EXPECT_EQ(files_in(dir_.path() / "one"), files_in(dir_.path() / "three"));
  const HfModel model(dir_.path() / "one");
  const std::string shared = "model.layers.1.mlp.shared_expert";
  using Dims = std::vector<std::int64_t>;
  EXPECT_EQ(model.locate(shared + ".up_proj.weight").second->shape, (Dims{0, model.config().hidden_size}));
  const auto [file, gate] = model.locate(shared + "_gate.weight");
  EXPECT_EQ(gate->shape, (Dims{1, model.config().hidden_size}));
  std::vector<std::byte> values(gate->end - gate->begin, std::byte{1});
  file->read(*gate, 0, values);
  EXPECT_EQ(values, std::vector<std::byte>(values.size()));
}

TEST_F(Upcycle, RefusesAMixtureAsSource) {
  run(recipe(), options());
  UpcycleOptions o = options("again");
  o.from = dir_.path() / "moe";
  const Refusal r = refusal(recipe(), o);
  EXPECT_EQ(r.code, ExitCode::kBadInput);
  EXPECT_NE(r.message.find("mixture"), std::string::npos) << r.message;
}

TEST_F(Upcycle, CountsNonFiniteWeightsPerTensorBeforeTheFirstByte) {
  auto weights = tiny_weights(parse_model_config(tiny_config_json(shape_), "tiny"));
  weights.at("model.layers.1.mlp.up_proj.weight")[5] = std::numeric_limits<float>::quiet_NaN();
  weights.at("model.layers.1.mlp.up_proj.weight")[50] = std::numeric_limits<float>::infinity();
  weights.at("model.norm.weight")[0] = -std::numeric_limits<float>::infinity();
  fs::remove_all(dense_);
  write_tiny_dense(dense_, shape_, weights);
  const Refusal r = refusal(recipe(), options(), 3);
  EXPECT_EQ(r.code, ExitCode::kBadInput);
  EXPECT_NE(r.message.find("model.layers.1.mlp.up_proj.weight: 2 of"), std::string::npos) << r.message;
  EXPECT_NE(r.message.find("model.norm.weight: 1 of"), std::string::npos) << r.message;
  EXPECT_FALSE(fs::exists(dir_.path() / "moe"));
}

TEST_F(Upcycle, RefusesMissingTensorsAndShapesThatDoNotFitTheConfig) {
  auto weights = tiny_weights(parse_model_config(tiny_config_json(shape_), "tiny"));
  weights.erase("model.layers.0.mlp.down_proj.weight");
  fs::remove_all(dense_);
  write_tiny_dense(dense_, shape_, weights);
  EXPECT_EQ(refusal(recipe(), options()).code, ExitCode::kBadInput);

  fs::remove_all(dense_);
  write_tiny_dense(dense_, shape_);
  TinyShape other = shape_;
  other.ffn = 87;
  std::ofstream(dense_ / "config.json") << tiny_config_json(other);
  EXPECT_EQ(refusal(recipe(), options()).code, ExitCode::kBadInput);
}

TEST_F(Upcycle, TellsOfTooLittleDiskBeforeTheFirstByte) {
  UpcycleOptions o = options();
  o.free_space = [](const fs::path&) { return std::uint64_t{123'456}; };
  const Refusal r = refusal(recipe(), o);
  EXPECT_EQ(r.code, ExitCode::kBadInput);
  EXPECT_NE(r.message.find("123456 bytes"), std::string::npos) << r.message;
  EXPECT_FALSE(fs::exists(o.to));
}

TEST_F(Upcycle, ListsEverythingWrongBetweenRecipeAndModel) {
  UpcycleConfig c = recipe();
  c.experts.method = ExpertMethod::kVirtualGroup;
  c.target.num_experts = 61;
  c.target.shared_expert_intermediate_size = 85;
  c.experts.copies = 3;
  const Refusal r = refusal(c, options());
  EXPECT_EQ(r.code, ExitCode::kUsage);
  for (const char* part : {"61", "85", "experts.copies"})
    EXPECT_NE(r.message.find(part), std::string::npos) << r.message;

  c = recipe();
  c.experts.method = ExpertMethod::kCopy;  // 22 of 86
  EXPECT_EQ(refusal(c, options()).code, ExitCode::kUsage);
  c = recipe();
  c.experts.copies = 15;  // 15 * 86 < 60 * 22
  EXPECT_EQ(refusal(c, options()).code, ExitCode::kUsage);
  c.experts.copies = 16;
  run(c, options());
}

}  // namespace
}  // namespace upmoe
