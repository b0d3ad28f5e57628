// Which files of a model directory are read, and which are carried along: the choices of transformers,
// nothing from outside the folder, and a way out in every refusal.

#include "data/companions.h"

#include <sys/stat.h>

#include "data/hf_writer.h"
#include "data/model_source.h"
#include "tests/data/models.h"

namespace upmoe::test {
namespace {

void put(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path) << text;
}

TEST_F(Models, TheSingleFileWinsOverAnIndex) {
  put_sharded([](json& j) { j["weight_map"] = {{"model.norm.weight", "model-00001-of-00002.safetensors"}}; });
  expect_refused({"model-00001-of-00002.safetensors", "fetch the model again"}, "left_over_index_alone");
  const ModelConfig config = put_sharded();  // the old shards are there as well
  Weights newer = random_weights(config);
  for (auto& [name, values] : newer)
    for (float& v : values) v += 1.0f;
  write_file(dir / "model.safetensors", entries_of(config, "F32"), newer);
  check_boxes(HfModel(dir), newer, [](float v) { return v; });
}

// The weights need not be there, and need not be good.
TEST_F(Models, AConfigurationIsReadWithoutWeights) {
  const std::string function = function_of(put_config(true, false));
  EXPECT_EQ(function_of(config_of_model(dir)), function);
  EXPECT_EQ(function_of(config_of_model(dir / "config.json")), function);
  put(dir / "model.safetensors", "damaged");
  EXPECT_EQ(function_of(config_of_model(dir)), function);
  EXPECT_THROW(open_model(dir), Error);
  const fs::path empty = root / "empty";
  fs::create_directory(empty);
  for (const fs::path& nothing : {empty, root / "absent"}) {
    try {
      config_of_model(nothing);
      ADD_FAILURE() << nothing;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_NE(std::string(e.what()).find("config.json"), std::string::npos) << e.what();
    }
  }
}

TEST_F(Models, EveryRefusalOfFilesNamesItsCure) {
  const std::vector<std::tuple<const char*, std::function<void()>, std::vector<std::string>>> cases{
      {"nothing", [] {}, {"neither", "fetch the weights"}},
      {"pickle",
       [&] { put(dir / "pytorch_model.bin", "x"); },
       {"pytorch_model.bin is not read", "save_pretrained"}},
      {"gguf", [&] { put(dir / "m.gguf", "x"); }, {"m.gguf is not read"}},
      {"consolidated",
       [&] { put(dir / "consolidated.safetensors", "x"); },
       {"consolidated.safetensors would have to be named model.safetensors"}},
      {"shards_without_index",
       [&] { put(dir / "model-00001-of-00002.safetensors", "x"); },
       {"without their index"}},
      {"dangling_link",
       [&] { fs::create_symlink("../blobs/1", dir / "model.safetensors"); },
       {"is a link to ../blobs/1"}},
      {"pointer_of_git_lfs",
       [&] { put(dir / "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"); },
       {"git lfs pull"}},
      {"adapter",
       [&] {
         put(dir / "model.safetensors", "x");
         put(dir / "adapter_config.json", "{}");
       },
       {"adapter", "merge"}},
  };
  for (const auto& [name, make, words] : cases) {
    fs::remove_all(dir);
    fs::create_directory(dir);
    put_config(true, false);
    make();
    expect_refused(words, name);
  }
}

// Of a save that leaves a model as transformers 5 has it inside.
TEST_F(Models, JoinedExpertsAreExplained) {
  const ModelConfig config = put_config(true, false);
  auto entries = entries_of(config, "F32");
  const auto expert = std::find_if(entries.begin(), entries.end(), [](const SafetensorsEntry& e) {
    return e.name.find(".experts.0.") != std::string::npos;
  });
  ASSERT_NE(expert, entries.end());
  expert->name = "model.layers.0.mlp.experts.gate_up_proj";
  write_file(dir / "model.safetensors", entries, {});
  expect_refused({"experts.gate_up_proj", "save_original_format=True"}, "joined_experts");
}

TEST_F(Models, NamesWithoutTheirPrefixAreExplained) {
  const ModelConfig config = put_config(false, true);
  auto entries = entries_of(config, "F32");
  for (SafetensorsEntry& e : entries) e.name = e.name.substr(std::string("model.").size());
  write_file(dir / "model.safetensors", entries, {});
  expect_refused({"lack 'model.'", "AutoModelForCausalLM"}, "bare_model");
}

TEST_F(Models, AHeadBesideTiedEmbeddingsMustBeTheirCopy) {
  const ModelConfig config = put_config(false, true);
  auto entries = entries_of(config, "BF16");
  entries.push_back({"lm_head.weight", "F32", {11, 8}, 0, 0});
  Weights weights = random_weights(config);
  auto& embedding = weights["model.embed_tokens.weight"];
  for (float& v : embedding) v = to_float(to_bf16(v));
  weights["lm_head.weight"] = embedding;  // equal values, whatever the type
  write_file(dir / "model.safetensors", entries, weights);
  EXPECT_NO_THROW(HfModel{dir});
  EXPECT_FALSE(HfModel(dir).uses("lm_head.weight"));
  weights["lm_head.weight"].back() += 1;
  write_file(dir / "model.safetensors", entries, weights);
  expect_refused({"lm_head.weight differs", "\"tie_word_embeddings\": false", "remove it"}, "own_head");
}

TEST_F(Models, ASharedExpertOfWidthZeroMayBeThereOrNot) {
  std::string text = config_json(true, false);
  text.replace(text.find("_size\": 10"), 10, "_size\": 0");
  put(dir / "config.json", text);
  const ModelConfig config = read_model_config(dir);
  ASSERT_EQ(config.shared_expert_intermediate_size, 0);
  const Weights weights = random_weights(config);
  auto entries = entries_of(config, "F32");
  std::erase_if(entries,
                [](const SafetensorsEntry& e) { return e.name.find("shared") != std::string::npos; });
  EXPECT_EQ(entries.size() + 8, entries_of(config, "F32").size());  // two layers
  write_file(dir / "model.safetensors", entries, weights);
  check_boxes(HfModel(dir), weights, [](float v) { return v; });
  entries = entries_of(config, "F32");
  write_file(dir / "model.safetensors", entries, weights);
  const HfModel model(dir);
  check_boxes(model, weights, [](float v) { return v; });
  EXPECT_FALSE(model.uses("model.layers.0.mlp.shared_expert_gate.weight"));
  // and is written as transformers writes it
  write_hf_model({.dir = root / "out", .companions = {}, .inputs = {}, .dtype = DType::kF32}, config,
                 [&](const ParamSpec& p, const Box& part, TensorView out) { model.read(p, part, out); });
  const HfModel written(root / "out");
  EXPECT_EQ(written.tensors().size(), entries.size());
  using Dims = std::vector<std::int64_t>;
  EXPECT_EQ(written.locate("model.layers.1.mlp.shared_expert.gate_proj.weight").second->shape, (Dims{0, 8}));
  EXPECT_EQ(written.locate("model.layers.1.mlp.shared_expert.down_proj.weight").second->shape, (Dims{8, 0}));
  EXPECT_EQ(written.locate("model.layers.1.mlp.shared_expert_gate.weight").second->shape, (Dims{1, 8}));
  check_boxes(written, weights, [](float v) { return v; });
  for (SafetensorsEntry& e : entries)
    if (e.name.ends_with("0.mlp.shared_expert.up_proj.weight")) e.shape = {1, 8};
  write_file(dir / "model.safetensors", entries, weights);
  expect_refused({"shape [1, 8], expected [0, 8]"}, "a_shared_expert_that_is_none");
}

TEST_F(Models, OnlyFilesOfTheFolderAreCarriedAlong) {
  const fs::path cache = root / "models--a--b", snapshot = cache / "snapshots" / "main";
  put(root / "secret", "secret");
  put(cache / "blobs" / "1", "blob");
  put(cache / "secret", "secret");
  put(snapshot / "LICENSE", "free");
  put(snapshot / "notes.txt", "private");
  put(snapshot / "additional_chat_templates" / "tools.jinja", "template");
  put(snapshot / "additional_chat_templates" / "notes.txt", "private");
  fs::create_symlink("../../blobs/1", snapshot / "tokenizer.json");
  fs::create_symlink("LICENSE", snapshot / "LICENSE.txt");
  fs::create_symlink(root / "secret", snapshot / "merges.txt");
  fs::create_symlink("../../secret", snapshot / "vocab.json");
  fs::create_symlink("nothing", snapshot / "added_tokens.json");
  fs::create_symlink(root / "secret", snapshot / "additional_chat_templates" / "x.jinja");
  fs::create_directory(snapshot / "chat_template.jinja");
  ASSERT_EQ(mkfifo((snapshot / "generation_config.json").c_str(), 0666), 0);
  const std::vector<fs::path> expected{"tokenizer.json", "LICENSE", "LICENSE.txt",
                                       "additional_chat_templates/tools.jinja"};
  EXPECT_EQ(companions_in(snapshot), expected);
  EXPECT_EQ(companion_bytes(snapshot), 4u + 4 + 4 + 8);
  const fs::path out = root / "out";
  fs::create_directory(out);
  copy_companions(snapshot, out);
  std::vector<std::string> copied;
  for (const auto& entry : fs::recursive_directory_iterator(out)) {
    EXPECT_FALSE(entry.is_symlink());
    if (entry.is_regular_file()) copied.push_back(entry.path().lexically_relative(out).string());
  }
  EXPECT_EQ(copied.size(), expected.size());
  std::ifstream in(out / "tokenizer.json");
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), "blob");
  EXPECT_TRUE(companions_in(root / "nowhere").empty());
}

}  // namespace
}  // namespace upmoe::test
