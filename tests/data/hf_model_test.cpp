// Reading model directories: any box of any parameter, hostile indexes, every difference listed at once.

#include "tests/data/models.h"

namespace upmoe::test {
namespace {

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
  // Old files carry it.
  entries.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {1}, 0, 0});
  write_file(dir / "model.safetensors", entries, random_weights(config));
  expect_refused({"model.embed_tokens.weight: shape [11, 9], expected [11, 8]", wrong + ": dtype I64",
                  missing + ": missing", "model.layers.7.extra: not part"},
                 "all_at_once");
}

TEST_F(Models, AnUntiedHeadMustBeThere) {
  const ModelConfig tied = put_config(false, true);
  auto entries = entries_of(tied, "F32");
  for (const SafetensorsEntry& e : entries) EXPECT_NE(e.name, "lm_head.weight");
  write_file(dir / "model.safetensors", entries, random_weights(tied));
  EXPECT_NO_THROW(HfModel{dir});
  put_config(false, false);
  expect_refused({"lm_head.weight: missing"}, "untied_without_head");
  entries.push_back({"lm_head.weight", "F32", {11, 8}, 0, 0});
  write_file(dir / "model.safetensors", entries, random_weights(tied));
  EXPECT_NO_THROW(HfModel{dir});
}

}  // namespace
}  // namespace upmoe::test
