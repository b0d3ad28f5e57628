#pragma once
// Small dense directories with random weights, and what upcycling makes of them, in memory.

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "configs/families/family.h"
#include "configs/param_table.h"
#include "data/hf_model.h"
#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"
#include "parallel/self_comm.h"
#include "tests/support/naive_moe.h"
#include "tests/support/temporary_directory.h"
#include "upcycle/recipe.h"
#include "upcycle/source_survey.h"
#include "upcycle/transforms.h"

namespace upmoe::test {

struct TinyShape {
  int hidden = 32, ffn = 86, layers = 2, vocab = 48;  // 86: as 5504 to 1408, no multiple of 22
  DType dtype = DType::kF32;
  bool tied = false;
  const char* family = "qwen2";
  int window = 0;  // of families that have one
};

inline std::string tiny_qwen2_json(const TinyShape& s) {
  return fmt::format(
      R"({{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": {},
"intermediate_size": {}, "num_hidden_layers": {}, "num_attention_heads": 4, "num_key_value_heads": 2,
"vocab_size": {}, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "max_position_embeddings": 64,
"tie_word_embeddings": {}, "torch_dtype": "{}", "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 1,
"sliding_window": 64, "use_sliding_window": false, "attention_dropout": 0.0}})",
      s.hidden, s.ffn, s.layers, s.vocab, s.tied, name_of(file_dtype_of(s.dtype)));
}

// In another family's form, with the layers that it cannot do without.
inline std::string tiny_config_json(const TinyShape& s) {
  ModelConfig c = parse_model_config(tiny_qwen2_json(s), "tiny");
  if (c.model_type == s.family) return c.raw_json;
  c.model_type = s.family;
  c.raw_json = "{}";
  const Traits carries = family_of(c).carries;
  c.qkv_bias = !carries.has(Trait::kNoBiases);
  c.qk_norm = carries.has(Trait::kNoQkNorm) ? QkNorm::kNone : QkNorm::kPerHead;
  c.sliding_window = s.window;
  return to_hf_json(c);
}

// Every tensor N(0.01, 0.3): large enough that silu is far from linear, mean far enough from zero to be seen.
inline std::map<std::string, std::vector<float>> tiny_weights(const ModelConfig& config) {
  std::map<std::string, std::vector<float>> weights;
  for (const ParamSpec& param : make_param_table(config)) {
    for (const HfTensor& t : hf_tensors_of(config, param)) {
      std::int64_t n = 1;
      for (const std::int64_t d : t.shape) n *= d;
      std::vector<float>& w = weights[t.name];
      w.resize(static_cast<std::size_t>(n));
      normal_batch(philox_key(77, t.name), 0, n, w.data());
      for (float& v : w) v = 0.01f + 0.3f * v;
    }
  }
  return weights;
}

inline void write_tiny_dense(const std::filesystem::path& dir, const TinyShape& shape,
                             const std::map<std::string, std::vector<float>>& weights) {
  std::filesystem::create_directories(dir);
  std::ofstream(dir / "config.json") << tiny_config_json(shape);
  std::ofstream(dir / "tokenizer.json") << "{\"a\": 1}\n";
  const ModelConfig config = parse_model_config(tiny_config_json(shape), "tiny");
  std::map<std::string, std::vector<bf16>> rounded;
  std::map<std::string, ConstTensorView> views;
  for (const ParamSpec& param : make_param_table(config)) {
    for (const HfTensor& t : hf_tensors_of(config, param)) {
      const auto it = weights.find(t.name);
      if (it == weights.end()) continue;  // a test left it out
      Shape on_disk;
      on_disk.rank = static_cast<int>(t.shape.size());
      std::copy(t.shape.begin(), t.shape.end(), on_disk.dim.begin());
      if (shape.dtype == DType::kBF16) {
        std::vector<bf16>& r = rounded[t.name];
        for (const float v : it->second) r.push_back(to_bf16(v));
        views[t.name] = host_view(static_cast<const bf16*>(r.data()), on_disk);
      } else {
        views[t.name] = host_view(it->second.data(), on_disk);
      }
    }
  }
  write_safetensors(dir / "model.safetensors", views);
}

inline void write_tiny_dense(const std::filesystem::path& dir, const TinyShape& shape) {
  write_tiny_dense(dir, shape, tiny_weights(parse_model_config(tiny_config_json(shape), "tiny")));
}

inline NaiveVector to_doubles(const std::vector<std::byte>& bytes, DType dtype) {
  NaiveVector out(bytes.size() / size_of(dtype));
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (dtype == DType::kBF16) {
      bf16 v;
      std::memcpy(&v, bytes.data() + i * sizeof v, sizeof v);
      out[i] = to_float(v);
    } else {
      float v = 0;
      std::memcpy(&v, bytes.data() + i * sizeof v, sizeof v);
      out[i] = v;
    }
  }
  return out;
}

// A dense directory opened as the upcycler opens it.
struct TinySource {
  explicit TinySource(const std::filesystem::path& dir)
      : source(dir), survey(survey_source(source, *make_self_communicator(), 1)) {}
  const ModelConfig& config() const { return source.model().config(); }
  NaiveVector read(const std::string& name) const {
    const auto* entry = source.model().locate(name).second;
    std::vector<std::byte> bytes(entry->end - entry->begin);
    source.read(name, 0, bytes);
    return to_doubles(bytes, source.dtype());
  }
  NaiveTensors tensors() const {
    NaiveTensors all;
    for (const SafetensorsEntry* entry : source.model().tensors()) all[entry->name] = read(entry->name);
    return all;
  }
  // Every tensor of a recipe, whole.
  NaiveTensors make(const Recipe& recipe) const {
    const PermutationCache permutations(recipe.seed, static_cast<std::int32_t>(config().intermediate_size));
    const FillContext context{source, survey, permutations, recipe.seed};
    NaiveTensors all;
    for (const RecipeLine& line : recipe.lines) {
      std::vector<std::byte> bytes(static_cast<std::size_t>(line.rows() * line.columns()) *
                                   size_of(source.dtype()));
      fill(line, 0, line.rows(), context, bytes);
      all[line.target] = to_doubles(bytes, source.dtype());
    }
    return all;
  }

  DenseSource source;
  SourceSurvey survey;
};

// The A2.7B shape scaled to a TinyShape: 60 x 22 of 86 (G = 4 with two padding neurons), shared 88.
inline UpcycleConfig tiny_recipe() {
  UpcycleConfig c;
  c.target = {.num_experts = 60,
              .num_experts_per_tok = 4,
              .moe_intermediate_size = 22,
              .shared_expert_intermediate_size = 88,
              .norm_topk_prob = false};
  c.origin = "tiny recipe";
  return c;
}

}  // namespace upmoe::test
