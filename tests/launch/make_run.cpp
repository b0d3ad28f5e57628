// Writes a tiny model directory, token files and a run configuration into a folder: what run_test.py trains
// with. usage: make_run FOLDER

#include <fmt/format.h>

#include <fstream>

#include "tests/support/token_file.h"

namespace {

constexpr const char* kConfig = R"({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
"tie_word_embeddings": false, "hidden_act": "silu", "initializer_range": 0.1, "num_experts": 10,
"num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 24, "norm_topk_prob": false,
"decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "torch_dtype": "float32"})";

constexpr const char* kRun = R"(run: {{dir: {0}/run, seed: 1}}
model: {{path: {0}/model, init: random}}
data: {{train: [{{path: {0}/tokens.h5, weight: 1.0}}], seq_len: 32, shuffle: true, seed: 1}}
train: {{steps: 40, global_batch: 8, micro_batch: 1, precision: fp32}}
optimizer: {{lr: 1.0e-3}}
schedule: {{name: constant}}
parallel: {{ep: 2}}
checkpoint: {{every: 5, keep: 3}}
log: {{tensorboard: false}}
)";

std::vector<std::uint32_t> random_tokens(std::uint32_t vocab, int count) {
  std::vector<std::uint32_t> tokens;
  std::uint64_t x = 1;
  for (int i = 0; i < count; ++i) {
    x = x * 6364136223846793005ull + 1442695040888963407ull;
    tokens.push_back(static_cast<std::uint32_t>((x >> 33) % vocab));
  }
  return tokens;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::filesystem::path folder = argv[1];
  std::filesystem::create_directories(folder / "model");
  std::ofstream(folder / "model/config.json") << kConfig;
  std::ofstream(folder / "run.yaml") << fmt::format(kRun, folder.string());
  upmoe::write_token_file(folder / "tokens.h5", random_tokens(64, 20000), {}, 64);
  // Claims the model's vocabulary and breaks it once, in the middle.
  std::vector<std::uint32_t> poisoned = random_tokens(64, 20000);
  poisoned[64] = 64;
  upmoe::write_token_file(folder / "poisoned.h5", poisoned, {}, 64);
  return 0;
}
