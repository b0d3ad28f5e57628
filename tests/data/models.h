#pragma once
// What the tests of model directories share: small models with random weights, written in every form.

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include "data/hf_model.h"
#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"
#include "tests/support/random_box.h"
#include "tests/support/temporary_directory.h"

namespace upmoe::test {

namespace fs = std::filesystem;
using nlohmann::json;

inline std::string config_json(bool moe, bool tied) {
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

inline float pseudo_random(const std::string& name,
                           std::int64_t i) {  // cheap, so that sanitizers are not slow
  std::uint64_t bits = philox_key(static_cast<std::uint64_t>(i) + 3, name);
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  return 4.0f * uniform_from_bits(static_cast<std::uint32_t>(bits >> 32)) - 2.0f;
}

inline Weights random_weights(const ModelConfig& config) {
  Weights weights;
  for (const HfTensor& t : hf_tensors_of(config))
    for (std::int64_t i = 0; i < t.part.elements(); ++i) weights[t.name].push_back(pseudo_random(t.name, i));
  return weights;
}

inline std::uint16_t to_half(float v) {  // of values that fp16 holds: enough for what the test stores
  const auto bits = std::bit_cast<std::uint32_t>(v);
  const std::int32_t exponent = static_cast<std::int32_t>(bits >> 23 & 0xff) - 112;
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  if ((bits & 0x7fffffffu) == 0) return static_cast<std::uint16_t>(sign);
  return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(exponent) << 10 |
                                    (bits >> 13 & 0x3ffu));
}

// One safetensors file with entries as given: what write_safetensors cannot write (F16, wrong shapes).
inline void write_file(const fs::path& path, std::vector<SafetensorsEntry> entries, const Weights& weights) {
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

inline std::vector<SafetensorsEntry> entries_of(const ModelConfig& config, const std::string& dtype) {
  std::vector<SafetensorsEntry> entries;
  for (const HfTensor& t : hf_tensors_of(config)) entries.push_back({t.name, dtype, t.shape, 0, 0});
  return entries;
}

class Models : public testing::Test {
 protected:
  Models() {
    dir = root / "m";
    fs::create_directory(dir);
  }

  ModelConfig put_config(bool moe, bool tied) {
    std::ofstream(dir / "config.json") << config_json(moe, tied);
    return read_model_config(dir);
  }
  // Two files and their index; `change` may spoil the index first.
  ModelConfig put_sharded(const std::function<void(json&)>& change = {}) {
    const ModelConfig config = put_config(true, false);
    const auto all = entries_of(config, "F32");
    // The total_size is never believed.
    json index{{"metadata", {{"total_size", 1}}}, {"weight_map", json::object()}};
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
  TemporaryDirectory folder;
  fs::path root = folder.path(), dir;
};

// The element of a parameter at a global index, from the tensors on disk.
inline float expected_at(const ModelConfig& config, const ParamSpec& p, const Weights& weights,
                         const std::array<std::int64_t, 4>& index) {
  for (const HfTensor& t : hf_tensors_of(config, p)) {
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

inline void check_boxes(const HfModel& model, const Weights& weights,
                        const std::function<float(float)>& stored) {
  for (const ParamSpec& p : make_param_table(model.config()))
    for (std::uint64_t seed = 0; seed < 30; ++seed) {
      const Box box = seed == 0 ? whole(p.shape) : random_box(p.shape, seed, 1);
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
        const float expected = stored(expected_at(model.config(), p, weights, index));
        ASSERT_EQ(out[static_cast<std::size_t>(i)], expected)
            << p.name << " element " << i << " of " << box.extent.str();
        ASSERT_EQ(rounded[static_cast<std::size_t>(i)], to_bf16(expected)) << p.name;
      }
    }
}

}  // namespace upmoe::test
