#pragma once
// Whole runs through train(): a tiny model and data, run directories side by side, what came out of them.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "data/shard_store.h"
#include "parallel/thread_comm.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/token_file.h"
#include "trainer/training_run.h"

namespace upmoe::test {

namespace fs = std::filesystem;

constexpr std::int64_t kSeq = 16, kVocab = 64;

class WholeRun : public testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(dir_);
    fs::create_directories(dir_ / "model");
    std::ofstream(dir_ / "model/config.json")
        << R"({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
      "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
      "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
      "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu", "initializer_range": 0.1,
      "num_experts": 10, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 24,
      "norm_topk_prob": false, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001,
      "torch_dtype": "float32"})";
    std::vector<std::uint32_t> tokens;
    std::uint64_t x = 1;
    for (int i = 0; i < 4000; ++i) {
      x = x * 6364136223846793005ull + 1442695040888963407ull;
      tokens.push_back(static_cast<std::uint32_t>((x >> 33) % kVocab));
    }
    write_token_file(dir_ / "tokens.h5", tokens, {}, kVocab);
  }

  RunConfig config(const std::string& name, std::int64_t steps, int ep,
                   Precision precision = Precision::kFp32) const {
    RunConfig run;
    run.run.dir = (dir_ / name).string();
    run.model = {(dir_ / "model").string(), ModelInit::kRandom};
    run.data.train = {{(dir_ / "tokens.h5").string(), 1.0}};
    run.data.seq_len = kSeq;
    run.train.steps = steps;
    run.train.global_batch = 6;
    run.train.micro_batch = 1;
    run.train.precision = precision;
    run.optimizer.lr = 1e-2;
    run.schedule.name = ScheduleKind::kConstant;  // so that a shorter run is the beginning of a longer one
    run.parallel.ep = ep;
    run.checkpoint.every = 2;
    run.log.tensorboard = false;
    return run;
  }

  static void run(const RunConfig& config, int ranks) {
    run_in_threads(ranks, [&](Communicator& world) { EXPECT_EQ(train(config, world, {}), 0); });
  }

  // loss by step; fails when a step stands there twice
  std::map<std::int64_t, double> losses(const std::string& name) const {
    std::map<std::int64_t, double> found;
    std::ifstream in(dir_ / name / "metrics.jsonl");
    for (std::string line; std::getline(in, line);) {
      const auto j = nlohmann::json::parse(line);
      if (!j.contains("loss")) continue;
      EXPECT_TRUE(found.emplace(j["step"].get<std::int64_t>(), j["loss"].get<double>()).second) << line;
    }
    return found;
  }

  static std::map<std::pair<std::string, std::string>, std::vector<float>> contents(
      const fs::path& checkpoint) {
    const ShardStore store(checkpoint);
    std::map<std::pair<std::string, std::string>, std::vector<float>> all;
    for (const auto& [key, tensor] : store.tensors()) {
      std::vector<float>& values = all[key];
      values.resize(static_cast<std::size_t>(tensor.shape.elements()));
      store.read(key.first, key.second, whole(tensor.shape), host_view(values.data(), tensor.shape));
    }
    return all;
  }
  fs::path checkpoint(const std::string& name, std::int64_t step) const {
    return dir_ / name / "checkpoints" / fmt::format("step_{:08}", step);
  }

  const TemporaryDirectory folder_;
  const fs::path dir_ = folder_.path() / "run";
};

}  // namespace upmoe::test
