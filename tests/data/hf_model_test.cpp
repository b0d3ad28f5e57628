// Model directories: read in any box and dtype, refused with every difference at once, written complete or
// not at all.

#include "data/hf_model.h"
#include "kernels/core/normal_batch.h"

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/core/philox.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string config_json(bool moe, bool tied) {
  return fmt::format(
      R"({{"architectures": ["X"], "model_type": "{}", "hidden_act": "silu", "hidden_size": 8, "intermediate_size": 12,
"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 11, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "max_position_embeddings": 64, "tie_word_embeddings": {}, "torch_dtype": "float32",
"initializer_range": 0.02, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6,
"shared_expert_intermediate_size": 10, "decoder_sparse_step": 1, "norm_topk_prob": false, "router_aux_loss_coef": 0.001,
"mlp_only_layers": [], "own_key": [1, {{"a": null}}]}})",
      moe ? "qwen2_moe" : "qwen2", tied);
}

using Weights = std::map<std::string, std::vector<float>>;  // by name on disk

Weights random_weights(const ModelConfig& config) {
  Weights weights;
  for (const HfTensor& t : hf_tensors_of(config))
    for (std::int64_t i = 0; i < t.part.elements(); ++i)
      weights[t.name].push_back(normal_at(philox_key(3, t.name), static_cast<std::uint64_t>(i)));
  return weights;
}

std::uint16_t to_half(float v) {  // of values that fp16 holds: enough for what the test stores
  const auto bits = std::bit_cast<std::uint32_t>(v);
  const std::int32_t exponent = static_cast<std::int32_t>(bits >> 23 & 0xff) - 112;
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  if ((bits & 0x7fffffffu) == 0) return static_cast<std::uint16_t>(sign);
  return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(exponent) << 10 |
                                    (bits >> 13 & 0x3ffu));
}

// One safetensors file with entries as given: what write_safetensors cannot write (F16, wrong shapes).
void write_file(const fs::path& path, std::vector<SafetensorsEntry> entries, const Weights& weights) {
  std::ofstream out(path, std::ios::binary);
  out << make_safetensors_header(entries, {{"format", "pt"}});
  for (const SafetensorsEntry& e : entries) {
    const std::size_t n = static_cast<std::size_t>(e.end - e.begin) / (e.dtype == "F32"   ? 4
                                                                       : e.dtype == "I64" ? 8
                                                                                          : 2);
    for (std::size_t i = 0; i < n; ++i) {
      const auto it = weights.find(e.name);
      const float v = it == weights.end() ? 0.0f : it->second[i % it->second.size()];
      if (e.dtype == "F32") out.write(reinterpret_cast<const char*>(&v), 4);
      if (e.dtype == "I64") out.write("\0\0\0\0\0\0\0\0", 8);
      const std::uint16_t half = e.dtype == "BF16" ? to_bf16(v).bits : to_half(v);
      if (e.dtype == "BF16" || e.dtype == "F16") out.write(reinterpret_cast<const char*>(&half), 2);
    }
  }
}

std::vector<SafetensorsEntry> entries_of(const ModelConfig& config, const std::string& dtype) {
  std::vector<SafetensorsEntry> entries;
  for (const HfTensor& t : hf_tensors_of(config)) entries.push_back({t.name, dtype, t.shape, 0, 0});
  return entries;
}

class Models : public testing::Test {
 protected:
  Models() {
    std::string name = (fs::path(testing::TempDir()) / "models_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    root = name;
    dir = root / "m";
    fs::create_directory(dir);
  }
  ~Models() override { fs::remove_all(root); }

  ModelConfig put_config(bool moe, bool tied) {
    std::ofstream(dir / "config.json") << config_json(moe, tied);
    return read_model_config(dir);
  }
  // Two files and their index; `change` may spoil the index first.
  ModelConfig put_sharded(const std::function<void(json&)>& change = {}) {
    const ModelConfig config = put_config(true, false);
    const auto all = entries_of(config, "F32");
    json index{{"metadata", {{"total_size", 1}}},
               {"weight_map", json::object()}};  // total_size is never believed
    const std::size_t half = all.size() / 2;
    write_file(dir / "a.safetensors", {all.begin(), all.begin() + static_cast<std::ptrdiff_t>(half)},
               random_weights(config));
    write_file(dir / "b.safetensors", {all.begin() + static_cast<std::ptrdiff_t>(half), all.end()},
               random_weights(config));
    for (std::size_t i = 0; i < all.size(); ++i)
      index["weight_map"][all[i].name] = i < half ? "a.safetensors" : "b.safetensors";
    if (change) change(index);
    std::ofstream(dir / "model.safetensors.index.json") << index.dump();
    return config;
  }
  void expect_refused(const std::vector<std::string>& words, const char* name) {
    try {
      const HfModel model(dir);
      ADD_FAILURE() << name << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << name;
      for (const std::string& w : words)
        EXPECT_NE(std::string(e.what()).find(w), std::string::npos) << name << ": " << e.what();
    }
  }
  fs::path root, dir;
};

// The element of a parameter at a global index, from the tensors on disk.
float expected_at(const ParamSpec& p, const Weights& weights, const std::array<std::int64_t, 4>& index) {
  for (const HfTensor& t : hf_tensors_of(p)) {
    std::int64_t flat = 0;
    bool inside = true;
    for (int d = 0; d < p.shape.rank; ++d) {
      const std::int64_t i = index[static_cast<std::size_t>(d)] - t.part.offset[d];
      inside = inside && i >= 0 && i < t.part.extent[d];
      flat = flat * t.part.extent[d] + i;
    }
    if (inside) return weights.at(t.name)[static_cast<std::size_t>(flat)];
  }
  ADD_FAILURE() << p.name;
  return 0;
}

Box random_box(const Shape& shape, std::uint64_t seed) {
  Box box = whole(shape);
  for (int d = 0; d < shape.rank; ++d) {
    const auto bits = philox(seed, static_cast<std::uint64_t>(d));
    const auto i = static_cast<std::size_t>(d);
    box.offset.dim[i] = bits[0] % shape[d];
    box.extent.dim[i] = 1 + bits[1] % (shape[d] - box.offset[d]);
  }
  return box;
}

void check_boxes(const HfModel& model, const Weights& weights, const std::function<float(float)>& stored) {
  for (const ParamSpec& p : make_param_table(model.config()))
    for (std::uint64_t seed = 0; seed < 30; ++seed) {
      const Box box = seed == 0 ? whole(p.shape) : random_box(p.shape, seed);
      std::vector<float> out(static_cast<std::size_t>(box.elements()));
      std::vector<bf16> rounded(out.size());
      model.read(p, box, host_view(out.data(), box.extent));
      model.read(p, box, host_view(rounded.data(), box.extent));
      for (std::int64_t i = 0; i < box.elements(); ++i) {
        std::array<std::int64_t, 4> index{};
        std::int64_t rest = i;
        for (int d = p.shape.rank - 1; d >= 0; --d) {
          index[static_cast<std::size_t>(d)] = box.offset[d] + rest % box.extent[d];
          rest /= box.extent[d];
        }
        const float expected = stored(expected_at(p, weights, index));
        ASSERT_EQ(out[static_cast<std::size_t>(i)], expected)
            << p.name << " element " << i << " of " << box.extent.str();
        ASSERT_EQ(rounded[static_cast<std::size_t>(i)], to_bf16(expected)) << p.name;
      }
    }
}

TEST_F(Models, AnyBoxOfAnyParameterFromAnyDtype) {
  for (const bool moe : {false, true})
    for (const bool tied : {false, true})
      for (const std::string dtype : {"F32", "BF16", "F16"}) {
        const ModelConfig config = put_config(moe, tied);
        Weights weights = random_weights(config);
        if (dtype == "F16")  // what fp16 holds exactly
          for (auto& [name, w] : weights)
            for (float& v : w)
              v = to_float(to_bf16(v)) == 0 || std::abs(v) < 1e-3f ? 0.5f : to_float(to_bf16(v));
        write_file(dir / "model.safetensors", entries_of(config, dtype), weights);
        check_boxes(HfModel(dir), weights,
                    [&](float v) { return dtype == "BF16" ? to_float(to_bf16(v)) : v; });
      }
}

// All 65,536 bit patterns of fp16.
TEST_F(Models, HalfPrecisionIsConvertedExactly) {
  std::string text = config_json(false, true);
  text.replace(text.find("\"vocab_size\": 11"), 16, "\"vocab_size\": 8192");
  std::ofstream(dir / "config.json") << text;
  const ModelConfig config = read_model_config(dir);
  auto entries = entries_of(config, "F16");
  ASSERT_EQ(entries.front().name, "model.embed_tokens.weight");
  write_file(dir / "model.safetensors", entries, {});
  const std::string header = make_safetensors_header(entries, {{"format", "pt"}});
  {
    std::fstream file(dir / "model.safetensors", std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(header.size()));
    for (std::uint32_t h = 0; h < 65536; ++h) file.write(reinterpret_cast<const char*>(&h), 2);
  }
  const HfModel model(dir);
  const ParamSpec embed = make_param_table(config).front();
  std::vector<float> found(65536);
  model.read(embed, whole(embed.shape), host_view(found.data(), embed.shape));
  for (std::uint32_t h = 0; h < 65536; ++h) {
    const int exponent = static_cast<int>(h >> 10 & 31), mantissa = static_cast<int>(h & 1023);
    const double magnitude = exponent == 31  ? (mantissa == 0 ? INFINITY : NAN)
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    const float expected = static_cast<float>((h & 0x8000u) != 0 ? -magnitude : magnitude);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(found[h])) << h;
    } else {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(found[h]), std::bit_cast<std::uint32_t>(expected)) << h;
    }
  }
}

TEST_F(Models, ShardedWithIndex) {
  const ModelConfig config = put_sharded();
  const HfModel model(dir);
  check_boxes(model, random_weights(config), [](float v) { return v; });
  EXPECT_EQ(model.tensors().size(), hf_tensors_of(config).size());
  EXPECT_EQ(model.locate("lm_head.weight").first->path().filename(), "b.safetensors");
  EXPECT_THROW(model.locate("nothing"), Error);
  EXPECT_EQ(model.data_bytes(), 4 * static_cast<std::uint64_t>(count_params(config).total));
}

TEST_F(Models, HostileIndexes) {
  const std::string first = "model.embed_tokens.weight";
  const auto with = [&](const json& value) { return [=](json& j) { j["weight_map"][first] = value; }; };
  const std::vector<std::tuple<const char*, std::function<void(json&)>, std::string>> cases{
      {"absolute_path", with("/etc/passwd"), "plain name"},
      {"parent_folder", with("../m/a.safetensors"), "plain name"},
      {"two_dots", with(".."), "plain name"},
      {"one_dot", with("."), "plain name"},
      {"separator", with("x/a.safetensors"), "plain name"},
      {"backslash", with("..\\a.safetensors"), "plain name"},
      {"zero_byte", with(std::string("a.safetensors\0x", 15)), "plain name"},
      {"empty_name", with(""), "plain name"},
      {"number", with(1), "plain name"},
      {"null", with(nullptr), "plain name"},
      {"list", with(json::array({"a.safetensors"})), "plain name"},
      {"object", with(json::object()), "plain name"},
      {"missing_shard", with("c.safetensors"), "c.safetensors"},
      {"not_a_model_file", with("config.json"), "config.json"},
      {"tensor_in_the_wrong_shard", with("b.safetensors"), "it is in a.safetensors"},
      {"tensor_nowhere", [](json& j) { j["weight_map"]["ghost"] = "a.safetensors"; }, "ghost"},
      {"tensor_not_in_the_index", [&](json& j) { j["weight_map"].erase(first); }, "not in the index"},
      {"no_weight_map", [](json& j) { j.erase("weight_map"); }, "weight_map"},
      {"weight_map_is_a_list", [](json& j) { j["weight_map"] = json::array(); }, "weight_map"},
      {"not_an_object", [](json& j) { j = json::array(); }, "weight_map"},
      {"a_million_entries",
       [](json& j) {
         for (int i = 0; i < 1'000'000; ++i) j["weight_map"][std::to_string(i)] = "a.safetensors";
       },
       "and 999980 more"},
  };
  for (const auto& [name, change, word] : cases) {
    put_sharded(change);
    expect_refused({word}, name);
  }
  std::ofstream(dir / "model.safetensors.index.json") << "{";
  expect_refused({"index.json"}, "cut_off");
  std::ofstream(dir / "model.safetensors.index.json") << std::string(1'000'000, '[');
  expect_refused({"index.json"}, "nested_bomb");
  std::ofstream(dir / "model.safetensors.index.json")
      << R"({"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}})";
  expect_refused({"twice"}, "name_twice");
}

TEST_F(Models, TensorInTwoShards) {
  const ModelConfig config = put_sharded();
  auto all = entries_of(config, "F32");
  write_file(dir / "b.safetensors", all, random_weights(config));  // everything, a's tensors too
  expect_refused({"another file"}, "tensor_twice");
}

TEST_F(Models, IndexAndSingleFileTheIndexIsUsed) {
  const ModelConfig config = put_sharded();
  std::ofstream(dir / "model.safetensors") << "garbage";
  EXPECT_NO_THROW(HfModel{dir});
  fs::remove(dir / "model.safetensors.index.json");
  expect_refused({"model.safetensors"}, "single_file_is_garbage");
  fs::remove(dir / "model.safetensors");
  expect_refused({"neither"}, "no_model_file");
}

TEST_F(Models, TruncatedData) {
  put_sharded();
  fs::resize_file(dir / "b.safetensors", fs::file_size(dir / "b.safetensors") - 1);
  expect_refused({"b.safetensors", "truncated"}, "truncated");
}

TEST_F(Models, EveryDifferenceIsListedAtOnce) {
  const ModelConfig config = put_config(true, false);
  auto entries = entries_of(config, "F32");
  entries[0].shape = {11, 9};  // embedding
  entries[1].dtype = "I64";
  const std::string missing = entries[5].name, wrong = entries[1].name;
  entries.erase(entries.begin() + 5);
  entries.push_back({"model.layers.7.extra", "F32", {2}, 0, 0});
  entries.push_back(
      {"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {1}, 0, 0});  // old files carry it
  write_file(dir / "model.safetensors", entries, random_weights(config));
  expect_refused({"model.embed_tokens.weight: shape [11, 9], expected [11, 8]", wrong + ": dtype I64",
                  missing + ": missing", "model.layers.7.extra: not part"},
                 "all_at_once");
}

TEST_F(Models, TiedHeadMayBeThereOrNot) {
  const ModelConfig config = put_config(false, true);
  auto entries = entries_of(config, "F32");
  for (const SafetensorsEntry& e : entries) EXPECT_NE(e.name, "lm_head.weight");
  entries.push_back({"lm_head.weight", "F32", {11, 8}, 0, 0});
  write_file(dir / "model.safetensors", entries, random_weights(config));
  EXPECT_NO_THROW(HfModel{dir});
  put_config(false, false);  // untied: the head must be there
  EXPECT_NO_THROW(HfModel{dir});
  entries.pop_back();
  write_file(dir / "model.safetensors", entries, random_weights(config));
  expect_refused({"lm_head.weight: missing"}, "untied_without_head");
}

ReadTensor reader_of(const HfModel& model) {
  return [&](const ParamSpec& p, const Box& part, TensorView out) { model.read(p, part, out); };
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
    fs::create_directories(out.string() + ".tmp/left");  // of an attempt that was cut off
    write_hf_model(out.string() + "/", source.config(), DType::kF32, reader_of(source), dir, limit);
    check_boxes(HfModel(out), weights, [](float v) { return v; });
    EXPECT_FALSE(fs::exists(out.string() + ".tmp"));
    EXPECT_FALSE(fs::exists(out / "left"));
    EXPECT_TRUE(fs::exists(out / "tokenizer.json"));
    EXPECT_TRUE(fs::exists(out / "LICENSE"));
    EXPECT_FALSE(fs::exists(out / "secret.txt"));
    EXPECT_EQ(fs::exists(out / "model.safetensors"), limit == std::uint64_t{1} << 40);
    std::ifstream in(out / "config.json");
    EXPECT_EQ(json::parse(in)["own_key"], json::parse(R"([1, {"a": null}])"));
    EXPECT_THROW(write_hf_model(out, source.config(), DType::kF32, reader_of(source), {}, limit),
                 Error);  // exists
  }
  fs::create_directory(root / "empty");
  write_hf_model(root / "empty", source.config(), DType::kBF16, reader_of(source), {}, 1500);
  check_boxes(HfModel(root / "empty"), weights, [](float v) { return to_float(to_bf16(v)); });
  EXPECT_EQ(HfModel(root / "empty").config().dtype, "bfloat16");
  EXPECT_FALSE(fs::exists(root / "empty" / "tokenizer.json"));
  std::ofstream(root / "file") << "x";
  EXPECT_THROW(write_hf_model(root / "file", source.config(), DType::kF32, reader_of(source), {}, 1500),
               Error);
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

TEST_F(Models, AnErrorWhileWritingLeavesNoTarget) {
  put_sharded();
  const HfModel source(dir);
  int calls = 0;
  const ReadTensor breaks = [&](const ParamSpec& p, const Box& part, TensorView out) {
    if (++calls == 20) fail(ExitCode::kBadInput, "the source is gone");
    source.read(p, part, out);
  };
  EXPECT_THROW(write_hf_model(root / "out", source.config(), DType::kF32, breaks, {}, 1500), Error);
  EXPECT_FALSE(fs::exists(root / "out"));
  write_hf_model(root / "out", source.config(), DType::kF32, reader_of(source), {}, 1500);
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
    EXPECT_THROW(write_hf_model(full / "out", source.config(), DType::kF32, counted, {}, 1500), Error);
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

TEST(HfLayout, FullSizeModels) {
  const HfLayout moe = plan_hf_layout(qwen_shape(true), DType::kBF16, 4'000'000'000);
  EXPECT_EQ(moe.files.size(), 8u);
  EXPECT_EQ(moe.total_size, 28'631'568'384u);
  EXPECT_EQ(hf_tensors_of(qwen_shape(true)).size(), 4659u);
  EXPECT_EQ(json::parse(moe.index_json)["weight_map"].size(), 4659u);
  EXPECT_EQ(hf_tensors_of(qwen_shape(false)).size(), 291u);
  const HfLayout dense = plan_hf_layout(qwen_shape(false), DType::kBF16, 4'000'000'000);
  EXPECT_EQ(dense.files.size(), 1u);
  EXPECT_EQ(dense.files.front().name, "model.safetensors");
  EXPECT_TRUE(dense.index_json.empty());
}

}  // namespace
}  // namespace upmoe
