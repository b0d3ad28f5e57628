// Writing model directories: round trips, shards, errors that leave no target, layouts of the full-size models.

#include "data/hf_writer.h"

#include <gmock/gmock.h>

#include <array>
#include <cmath>

#include "data/companions.h"
#include "data/finite_values.h"
#include "data/folder.h"
#include "data/staged_directory.h"
#include "tests/data/models.h"

namespace upmoe::test {
namespace {

HfOutput output(const fs::path& dir, DType dtype = DType::kF32, std::uint64_t max_shard_bytes = 1500,
                const fs::path& companions = {}) {
  return {
      .dir = dir, .companions = companions, .inputs = {}, .dtype = dtype, .max_shard_bytes = max_shard_bytes};
}

ReadTensor reader_of(const HfModel& model) {
  return [&](const ParamSpec& p, const Box& part, TensorView out) { model.read(p, part, out); };
}

// The code that a config.json names beside it goes along, and no other.
TEST_F(Models, NamedCodeIsACompanion) {
  for (const char* name : {"configuration_x.py", "modeling_x.py", "setup.py"})
    std::ofstream(dir / name) << "pass";
  std::ofstream(dir / "config.json") << R"({"auto_map": {"AutoConfig": "configuration_x.XConfig",
    "AutoModel": ["modeling_x.XModel", null], "AutoTokenizer": "a/b--tokenization_x.X", "AutoNone": "../etc/x.Y"}})";
  EXPECT_THAT(companions_in(dir), testing::ElementsAre("configuration_x.py", "modeling_x.py"));
}

TEST_F(Models, ValuesThatAreNotFiniteAreNotWritten) {
  const HfModel source((put_sharded(), dir));
  const fs::path out = root / "unfinite";
  int tensors = 0;
  const ReadTensor broken = [&](const ParamSpec& p, const Box& part, TensorView to) {
    source.read(p, part, to);
    if (++tensors == 3) store_floats(std::array{NAN}, to, 1);
  };
  try {
    write_hf_model(output(out), source.config(), finite_alone(broken, dir));
    ADD_FAILURE() << "written";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_THAT(e.what(), testing::HasSubstr("holds 1 values that are not finite"));
  }
  EXPECT_FALSE(fs::exists(out));
}

TEST_F(Models, WriteAndReadBack) {
  const ModelConfig config = put_sharded();
  std::ofstream(dir / "tokenizer.json") << "{}";
  std::ofstream(dir / "LICENSE") << "free";
  std::ofstream(dir / "secret.txt") << "x";
  const HfModel source(dir);
  const Weights weights = random_weights(config);
  for (const std::uint64_t limit : {std::uint64_t{1}, std::uint64_t{1500}, std::uint64_t{1} << 40}) {
    const fs::path out = root / "nested" / fmt::format("out{}", limit);
    write_hf_model(output(out.string() + "/", DType::kF32, limit, dir), source.config(), reader_of(source));
    check_boxes(HfModel(out), weights, [](float v) { return v; });
    EXPECT_FALSE(fs::exists(out.string() + ".upmoe-partial"));
    EXPECT_TRUE(fs::exists(out / "tokenizer.json"));
    EXPECT_TRUE(fs::exists(out / "LICENSE"));
    EXPECT_FALSE(fs::exists(out / "secret.txt"));
    EXPECT_EQ(fs::exists(out / "model.safetensors"), limit == std::uint64_t{1} << 40);
    std::ifstream in(out / "config.json");
    EXPECT_EQ(json::parse(in)["own_key"], json::parse(R"([1, {"a": null}])"));
    EXPECT_THROW(write_hf_model(output(out), source.config(), reader_of(source)), Error);  // exists
  }
  fs::create_directory(root / "empty");
  write_hf_model(output(root / "empty", DType::kBF16), source.config(), reader_of(source));
  check_boxes(HfModel(root / "empty"), weights, [](float v) { return to_float(to_bf16(v)); });
  EXPECT_EQ(HfModel(root / "empty").config().dtype, FileDType::kBf16);
  EXPECT_FALSE(fs::exists(root / "empty" / "tokenizer.json"));
}

TEST_F(Models, ShardsKeepTheirLimit) {
  const ModelConfig config = put_config(true, false);
  const HfLayout layout = plan_hf_layout(config, DType::kF32, 1500);
  const json index = json::parse(layout.index_json);
  std::uint64_t total = 0;
  for (const HfLayout::File& f : layout.files) {
    total += f.entries.back().end;
    EXPECT_TRUE(f.entries.back().end <= 1500 || f.entries.size() == 1) << f.name;
    EXPECT_EQ(f.bytes, f.header.size() + f.entries.back().end);
    for (const SafetensorsEntry& e : f.entries) EXPECT_EQ(index["weight_map"][e.name], f.name);
  }
  EXPECT_EQ(total, layout.total_size);
  EXPECT_EQ(index["metadata"]["total_size"], total);
  EXPECT_EQ(index["weight_map"].size(), hf_tensors_of(config).size());
  EXPECT_EQ(layout.files.front().name, fmt::format("model-00001-of-{:05}.safetensors", layout.files.size()));
}

// transformers keeps them so, and bf16 would round a bias to another choice of experts.
TEST_F(Models, BiasesOfRoutersAreWrittenInFp32) {
  ModelConfig config = put_config(true, false);
  config.model_type = "dots1";
  config.raw_json = "{}";
  config.qkv_bias = config.shared_expert_gate = false;
  config.qk_norm = QkNorm::kPerHead;
  config.shared_expert_intermediate_size = 2 * config.moe_intermediate_size;
  config.router.score = RouterScore::kSigmoid;
  config.router_bias = true;
  const float value = 0.1234567f;
  write_hf_model(output(root / "out", DType::kBF16), config,
                 [&](const ParamSpec&, const Box&, TensorView out) {
                   for (std::int64_t i = 0; i < out.elements(); ++i) {
                     if (out.dtype == DType::kF32) out.as<float>()[i] = value;
                     if (out.dtype == DType::kBF16) out.as<bf16>()[i] = to_bf16(value);
                   }
                 });
  const HfModel written(root / "out");
  int biases = 0;
  for (const SafetensorsEntry* e : written.tensors()) {
    const bool bias = e->name.ends_with("e_score_correction_bias");
    EXPECT_EQ(e->dtype, bias ? "F32" : "BF16") << e->name;
    EXPECT_EQ(e->begin % (bias ? 4 : 2), 0u) << e->name;
    biases += bias ? 1 : 0;
  }
  EXPECT_EQ(biases, written.config().num_moe_layers());
  const ParamSpec bias = make_param(written.config(), Role::kRouterBias, 0);
  std::vector<float> read(static_cast<std::size_t>(bias.shape.elements()));
  written.read(bias, whole(bias.shape), host_view(read.data(), bias.shape));
  EXPECT_EQ(read, std::vector<float>(read.size(), value));
}

// What transformers has no name for stays in checkpoints.
TEST_F(Models, ABufferWithoutANameIsLeftOut) {
  const ModelConfig config = put_sharded();
  const HfModel source(dir);
  ModelConfig more = source.config();
  more.router_bias = true;
  ASSERT_EQ(make_param_table(more).size(), make_param_table(config).size() + 2);
  write_hf_model(output(root / "out"), more, reader_of(source));
  check_boxes(HfModel(root / "out"), random_weights(config), [](float v) { return v; });
}

TEST_F(Models, AnErrorWhileWritingLeavesNoTarget) {
  put_sharded();
  const HfModel source(dir);
  int calls = 0;
  const ReadTensor breaks = [&](const ParamSpec& p, const Box& part, TensorView out) {
    if (++calls == 20) fail(ExitCode::kBadInput, "the source is gone");
    source.read(p, part, out);
  };
  EXPECT_THROW(write_hf_model(output(root / "out"), source.config(), breaks), Error);
  EXPECT_FALSE(fs::exists(root / "out"));
  EXPECT_FALSE(fs::exists(root / "out.upmoe-partial"));
  write_hf_model(output(root / "out"), source.config(), reader_of(source));
  EXPECT_NO_THROW(HfModel(root / "out"));
}

TEST_F(Models, FreeSpaceIsCheckedBeforeTheFirstByte) {
  EXPECT_NO_THROW(require_free_space(root / "not" / "yet", 1));
  try {
    require_free_space(root, std::uint64_t{1} << 62);
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_NE(std::string(e.what()).find("4611686018427387904"), std::string::npos) << e.what();
  }
  const fs::path full = root / "full";
  fs::create_directory(full);
  if (mount("tmpfs", full.c_str(), "tmpfs", 0, "size=2m") == 0) {
    put_sharded();
    const HfModel source(dir);
    int calls = 0;
    const ReadTensor counted = [&](const ParamSpec&, const Box&, TensorView) { ++calls; };
    EXPECT_THROW(write_hf_model(output(full / "a" / "out"), source.config(), counted), Error);
    EXPECT_EQ(calls, 0);
    EXPECT_TRUE(fs::is_empty(full));
    EXPECT_EQ(umount(full.c_str()), 0);
  }
}

ModelConfig qwen_shape(bool moe) {
  ModelConfig c;
  c.model_type = moe ? "qwen2_moe" : "qwen2";
  c.vocab_size = 151936;
  c.hidden_size = 2048;
  c.intermediate_size = moe ? 5632 : 5504;
  c.num_hidden_layers = 24;
  c.num_attention_heads = c.num_key_value_heads = 16;
  c.head_dim = 128;
  if (moe) {
    c.num_experts = 60;
    c.num_experts_per_tok = 4;
    c.moe_intermediate_size = 1408;
    c.shared_expert_intermediate_size = 5632;
  }
  return c;
}

// transformers registers a block's modules in this order, and its files list tensors in it.
std::vector<std::string> state_dict_names(const ModelConfig& c) {
  std::vector<std::string> names{"model.embed_tokens.weight"};
  const auto swiglu = [&](const std::string& prefix) {
    for (const char* which : {"gate", "up", "down"})
      names.push_back(fmt::format("{}{}_proj.weight", prefix, which));
  };
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    const std::string layer = fmt::format("model.layers.{}.", i);
    for (const char* which : {"q", "k", "v"})
      for (const char* kind : {"weight", "bias"})
        names.push_back(fmt::format("{}self_attn.{}_proj.{}", layer, which, kind));
    names.push_back(layer + "self_attn.o_proj.weight");
    if (c.num_experts == 0) {
      swiglu(layer + "mlp.");
    } else {
      names.push_back(layer + "mlp.gate.weight");
      for (int e = 0; e < c.num_experts; ++e) swiglu(fmt::format("{}mlp.experts.{}.", layer, e));
      swiglu(layer + "mlp.shared_expert.");  // whatever its width
      names.push_back(layer + "mlp.shared_expert_gate.weight");
    }
    names.push_back(layer + "input_layernorm.weight");
    names.push_back(layer + "post_attention_layernorm.weight");
  }
  names.push_back("model.norm.weight");
  if (!c.tie_word_embeddings) names.push_back("lm_head.weight");
  return names;
}

// By number, not by name: layer 10 behind layer 2.
TEST(HfLayout, OrderOfTheStateDict) {
  for (const bool moe : {false, true})
    for (const bool tied : {false, true}) {
      ModelConfig config = qwen_shape(moe);
      config.tie_word_embeddings = tied;
      if (tied) config.shared_expert_intermediate_size = 0;
      std::vector<std::string> names;
      for (const HfTensor& t : hf_tensors_of(config)) names.push_back(t.name);
      EXPECT_EQ(names, state_dict_names(config));
    }
}

TEST(HfLayout, FullSizeModels) {
  const HfLayout moe = plan_hf_layout(qwen_shape(true), DType::kBF16, 4'000'000'000);
  EXPECT_EQ(moe.files.size(), 8u);
  EXPECT_EQ(moe.total_size, 28'631'568'384u);
  EXPECT_EQ(hf_tensors_of(qwen_shape(true)).size(), 4659u);
  EXPECT_EQ(json::parse(moe.index_json)["weight_map"].size(), 4659u);
  EXPECT_EQ(moe.files.front().entries.size(), 578u);  // as in the published Qwen1.5-MoE-A2.7B
  EXPECT_EQ(hf_tensors_of(qwen_shape(false)).size(), 291u);
  const HfLayout dense = plan_hf_layout(qwen_shape(false), DType::kBF16, 4'000'000'000);
  EXPECT_EQ(dense.files.size(), 1u);
  EXPECT_EQ(dense.files.front().name, "model.safetensors");
  EXPECT_TRUE(dense.index_json.empty());
}

}  // namespace
}  // namespace upmoe::test
