// Experts of several dense models in one mixture: whose neurons an expert has, what the average is, and bad input.

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "parallel/thread_comm.h"
#include "tests/support/own_folder.h"
#include "tests/support/read_file.h"
#include "tests/support/tiny_dense.h"
#include "upcycle/upcycler.h"

namespace upmoe {
namespace {

using namespace test;
namespace fs = std::filesystem;

NaiveTensors tensors_of(const fs::path& dir, DType dtype) {
  NaiveTensors all;
  const HfModel model(dir);
  for (const SafetensorsEntry* entry : model.tensors()) {
    const auto [file, found] = model.locate(entry->name);
    std::vector<std::byte> bytes(found->end - found->begin);
    file->read(*found, 0, bytes);
    all[entry->name] = to_doubles(bytes, dtype);
  }
  return all;
}

class Sources : public ::testing::TestWithParam<DType> {
 protected:
  Sources() { shape_.dtype = GetParam(); }
  // Dense model i: of the same shape, other weights.
  fs::path dense(int i) const { return dir_.path() / fmt::format("dense{}", i); }
  void write(int i, const TinyShape& shape, bool alike = false) const {
    auto weights = tiny_weights(parse_model_config(tiny_config_json(shape), "tiny"));
    if (!alike)
      for (auto& [name, values] : weights)
        for (std::size_t k = 0; k < values.size(); ++k)
          values[k] += 0.1f * static_cast<float>(i) * values[(k + 7) % values.size()];
    write_tiny_dense(dense(i), shape, weights);
  }
  UpcycleOptions options(const std::string& to, int sources) const {
    UpcycleOptions o;
    o.from = dense(0);
    for (int i = 1; i < sources; ++i) o.more_from.push_back(dense(i));
    o.to = dir_.path() / to;
    o.threads = 2;
    o.piece_bytes = 4096;
    o.error_tokens = 4;
    o.progress = false;
    return o;
  }
  // Whole copies, top-2 of 8.
  static UpcycleConfig copies() {
    UpcycleConfig c = tiny_recipe();
    c.target = {
        .num_experts = 8, .num_experts_per_tok = 2, .moe_intermediate_size = 86, .norm_topk_prob = true};
    c.experts.method = ExpertMethod::kCopy;
    c.shared.method = SharedMethod::kNone;
    return c;
  }
  static void run(const UpcycleConfig& config, const UpcycleOptions& o, int ranks = 1) {
    run_in_threads(ranks, [&](Communicator& comm) { upcycle(config, o, comm); });
  }
  std::string refusal(const UpcycleConfig& config, const UpcycleOptions& o, ExitCode code) const {
    try {
      run(config, o, 2);
      ADD_FAILURE() << "was not refused";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code);
      return e.what();
    }
    return "";
  }
  // As an element of the output's type.
  static double rounded(double v) {
    const auto f = static_cast<float>(v);
    return GetParam() == DType::kBF16 ? to_float(to_bf16(f)) : f;
  }

  TinyShape shape_;
  TemporaryDirectory dir_;
};

TEST_P(Sources, ExpertsComeInEqualPartsAndTheRestIsTheMean) {
  constexpr int kSources = 4;
  std::vector<NaiveTensors> from;
  for (int i = 0; i < kSources; ++i) {
    write(i, shape_);
    from.push_back(tensors_of(dense(i), GetParam()));
  }
  run(copies(), options("moe", kSources));
  const NaiveTensors made = tensors_of(dir_.path() / "moe", GetParam());
  for (const int layer : {0, 1})
    for (std::size_t e = 0; e < 8; ++e)
      for (const char* matrix : {"gate", "up", "down"})
        EXPECT_EQ(
            tensor(made, fmt::format("model.layers.{}.mlp.experts.{}.{}_proj.weight", layer, e, matrix)),
            tensor(from[e / 2], fmt::format("model.layers.{}.mlp.{}_proj.weight", layer, matrix)));
  for (const auto& [name, values] : from[0]) {
    if (name.find(".mlp.") != std::string::npos) continue;
    for (std::size_t k = 0; k < values.size(); ++k) {
      double sum = 0;
      for (const NaiveTensors& tensors : from) sum += tensor(tensors, name)[k];
      ASSERT_EQ(tensor(made, name)[k], rounded(sum / kSources)) << name;
    }
  }
  UpcycleConfig first = copies();
  first.sources.rest = SourcesRest::kFirst;
  run(first, options("first", kSources));
  const NaiveTensors of_first = tensors_of(dir_.path() / "first", GetParam());
  for (const auto& [name, values] : made) {
    const bool rest = name.find(".mlp.") == std::string::npos;
    EXPECT_EQ(tensor(of_first, name), rest ? tensor(from[0], name) : values) << name;
  }
}

// Cut, permuted and redrawn experts as well: those of one dense model are what it alone would make of as many.
TEST_P(Sources, EveryDenseModelMakesItsExpertsAsItWouldAlone) {
  for (const int i : {0, 1}) write(i, shape_);
  UpcycleConfig c = tiny_recipe();
  run(c, options("both", 2));
  const NaiveTensors both = tensors_of(dir_.path() / "both", GetParam());
  c.target.num_experts = 30;
  for (const int i : {0, 1}) {
    UpcycleOptions o = options(fmt::format("alone{}", i), 1);
    o.from = dense(i);
    run(c, o);
    const NaiveTensors alone = tensors_of(o.to, GetParam());
    for (int e = 0; e < 30; ++e)
      for (const char* matrix : {"gate", "up", "down"}) {
        const char* name = "model.layers.1.mlp.experts.{}.{}_proj.weight";
        ASSERT_EQ(tensor(both, fmt::format(fmt::runtime(name), 30 * i + e, matrix)),
                  tensor(alone, fmt::format(fmt::runtime(name), e, matrix)))
            << e;
      }
  }
}

// Several that are one and the same: the mixture of one, to the bit, function included.
TEST_P(Sources, AlikeTheyAreOne) {
  for (const int i : {0, 1, 2, 3}) write(i, shape_, true);
  run(copies(), options("one", 1));
  run(copies(), options("four", 4));
  EXPECT_EQ(tensors_of(dir_.path() / "one", GetParam()), tensors_of(dir_.path() / "four", GetParam()));
  const auto report = nlohmann::json::parse(read_file(dir_.path() / "four" / "upcycle_report.json"));
  const double rounding = rounding_of_layer(HfModel(dir_.path() / "four").config());
  for (const auto& layer : report.at("layers")) EXPECT_LT(layer.at("relative_error"), rounding);
  ASSERT_EQ(report.at("further_sources").size(), 3u);
  EXPECT_EQ(report.at("further_sources")[2].at("files"), report.at("source").at("files"));
  EXPECT_FALSE(nlohmann::json::parse(read_file(dir_.path() / "one" / "upcycle_report.json"))
                   .contains("further_sources"));
}

// Numbers are keyed by the tensor, so a redrawn neuron of expert 30 e in two mixtures differs by its moments alone.
TEST_P(Sources, RedrawnNeuronsHaveTheMomentsOfTheirOwnDenseModel) {
  write(0, shape_);
  auto weights = tiny_weights(parse_model_config(tiny_config_json(shape_), "tiny"));
  for (auto& [name, values] : weights)
    if (name.find(".mlp.") != std::string::npos)
      for (float& v : values) v *= 2;
  write_tiny_dense(dense(1), shape_, weights);
  UpcycleConfig c = copies();
  c.experts.reinit = 1;
  run(c, options("moe", 2));
  const NaiveTensors made = tensors_of(dir_.path() / "moe", GetParam());
  const auto size = [&](int expert) {
    double square = 0;
    for (const double v : tensor(made, fmt::format("model.layers.0.mlp.experts.{}.up_proj.weight", expert)))
      square += v * v;
    return std::sqrt(square);
  };
  EXPECT_NEAR(size(7) / size(3), 2, 0.15);  // of 2,752 numbers each: 1.3 % each
}

TEST_P(Sources, TheSameBytesForAnyNumberOfRanks) {
  for (const int i : {0, 1}) write(i, shape_);
  UpcycleConfig c = tiny_recipe();
  c.experts.reinit = 0.5;
  c.experts.reinit_stats = ReinitStats::kBlock;
  c.experts.noise = 0.01;
  c.experts.noise_share = 0.5;
  run(c, options("one", 2));
  for (const int ranks : {2, 3, 4}) {
    const std::string to = fmt::format("ranks{}", ranks);
    run(c, options(to, 2), ranks);
    for (const char* file : {"model.safetensors", "upcycle_report.json", "config.json"})
      EXPECT_EQ(read_file(dir_.path() / to / file), read_file(dir_.path() / "one" / file)) << file << ranks;
  }
}

TEST_P(Sources, WhatDoesNotFitIsToldBeforeTheFirstByte) {
  write(0, shape_);
  TinyShape wide = shape_;
  wide.ffn = 88;
  write(1, wide);
  std::string words = refusal(copies(), options("moe", 2), ExitCode::kBadInput);
  EXPECT_NE(words.find("intermediate_size: 86 and 88"), std::string::npos) << words;
  TinyShape other = shape_;
  other.dtype = GetParam() == DType::kBF16 ? DType::kF32 : DType::kBF16;
  fs::remove_all(dense(1));
  write(1, other);
  words = refusal(copies(), options("moe", 2), ExitCode::kBadInput);
  EXPECT_NE(words.find("tensors in"), std::string::npos) << words;
  for (const int i : {1, 2}) {
    fs::remove_all(dense(i));
    write(i, shape_);
  }
  words = refusal(copies(), options("moe", 3), ExitCode::kUsage);
  EXPECT_NE(words.find("3 dense models do not make 8 experts"), std::string::npos) << words;
  EXPECT_FALSE(fs::exists(dir_.path() / "moe"));
}

// Every rank makes its part, from what lies on its host and by the recipe that it read there.
TEST_P(Sources, AreTheSameOnEveryRank) {
  if (!test::may_work_in_own_folder()) GTEST_SKIP() << "threads may not have folders of their own here";
  const auto host = [&](int rank) { return dir_.path() / fmt::format("host{}", rank); };
  for (const int rank : {0, 1}) {
    write(rank, shape_);
    fs::create_directory(host(rank));
    fs::copy(dense(rank), host(rank) / "model");
  }
  UpcycleOptions o = options("moe", 1);
  o.from = "model";
  const auto refusal_of = [&](std::int64_t seed_of_rank_1) {
    std::string words;
    try {
      run_in_threads(2, [&](Communicator& comm) {
        work_in(host(comm.rank()));
        UpcycleConfig c = copies();
        if (comm.rank() == 1) c.seed = seed_of_rank_1;
        upcycle(c, o, comm);
      });
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kUsage) << e.what();
      words = e.what();
    }
    return words;
  };
  const std::int64_t seed = copies().seed;
  EXPECT_NE(refusal_of(seed).find("different models in --from: rank 0 differs from rank 1 (rank 0 has"),
            std::string::npos);
  EXPECT_NE(refusal_of(seed + 1).find("different recipes: rank 0 differs"), std::string::npos);
  EXPECT_FALSE(fs::exists(o.to));
  fs::remove_all(host(1) / "model");
  fs::copy(dense(0), host(1) / "model");
  EXPECT_EQ(refusal_of(seed), "");
  EXPECT_TRUE(fs::exists(o.to));
}

INSTANTIATE_TEST_SUITE_P(Types, Sources, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace upmoe
