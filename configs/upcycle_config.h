#pragma once
// An upcycling recipe: the YAML file of `upmoe upcycle`, as plain data. Keys are a contract.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "configs/layer_choice.h"
#include "configs/names.h"

namespace upmoe {

// Which neurons of the dense feed-forward an expert is made of.
enum class ExpertMethod : std::uint8_t { kCopy, kSplit, kShuffle, kVirtualGroup, kRandom, kCluster };
template <>
inline constexpr Names<ExpertMethod> kNames<ExpertMethod>{
    .built = {{ExpertMethod::kCopy, "copy"},
              {ExpertMethod::kSplit, "split"},
              {ExpertMethod::kShuffle, "shuffle"},
              {ExpertMethod::kVirtualGroup, "virtual_group"},
              {ExpertMethod::kRandom, "random"},
              {ExpertMethod::kCluster, "cluster"}}};

// Of experts.method split: which neurons stand beside each other.
enum class SplitOrder : std::uint8_t { kConsecutive, kRandom };
template <>
inline constexpr Names<SplitOrder> kNames<SplitOrder>{
    .built = {{SplitOrder::kConsecutive, "consecutive"}, {SplitOrder::kRandom, "random"}}};

// Of what is drawn anew: mean and deviation of the source matrix, or initializer_range.
enum class ReinitFrom : std::uint8_t { kSource, kConfig };
template <>
inline constexpr Names<ReinitFrom> kNames<ReinitFrom>{
    .built = {{ReinitFrom::kSource, "source"}, {ReinitFrom::kConfig, "config"}}};

// Over what the source's mean and deviation are taken: the matrix, or the part of it that is drawn anew.
enum class ReinitStats : std::uint8_t { kMatrix, kBlock };
template <>
inline constexpr Names<ReinitStats> kNames<ReinitStats>{
    .built = {{ReinitStats::kMatrix, "matrix"}, {ReinitStats::kBlock, "block"}}};

// Whole neurons, or an independent set for each matrix.
enum class ReinitSets : std::uint8_t { kJoint, kPerMatrix };
template <>
inline constexpr Names<ReinitSets> kNames<ReinitSets>{
    .built = {{ReinitSets::kJoint, "joint"}, {ReinitSets::kPerMatrix, "per_matrix"}}};

enum class SharedMethod : std::uint8_t { kDense, kRandom, kShuffle, kZero, kNone, kActive };
template <>
inline constexpr Names<SharedMethod> kNames<SharedMethod>{.built = {{SharedMethod::kDense, "dense"},
                                                                    {SharedMethod::kRandom, "random"},
                                                                    {SharedMethod::kShuffle, "shuffle"},
                                                                    {SharedMethod::kZero, "zero"},
                                                                    {SharedMethod::kNone, "none"},
                                                                    {SharedMethod::kActive, "active"}}};

enum class RouterMethod : std::uint8_t { kNormal, kZero, kVirtualGroup, kUniform, kPrompts, kNeurons };
template <>
inline constexpr Names<RouterMethod> kNames<RouterMethod>{
    .built = {{RouterMethod::kNormal, "normal"},
              {RouterMethod::kZero, "zero"},
              {RouterMethod::kVirtualGroup, "virtual_group"},
              {RouterMethod::kUniform, "uniform"},
              {RouterMethod::kPrompts, "prompts"},
              {RouterMethod::kNeurons, "neurons"}}};

// A sigmoid on the shared expert's output for each token; auto: as the target's family has it.
enum class SharedGate : std::uint8_t { kAuto, kNone, kSigmoid };
template <>
inline constexpr Names<SharedGate> kNames<SharedGate>{
    .built = {{SharedGate::kAuto, "auto"}, {SharedGate::kNone, "none"}, {SharedGate::kSigmoid, "sigmoid"}}};

// Of several dense models, what experts are not made of: attention, norms, embedding and head, layers that stay dense.
enum class SourcesRest : std::uint8_t { kAverage, kFirst };
template <>
inline constexpr Names<SourcesRest> kNames<SourcesRest>{
    .built = {{SourcesRest::kAverage, "average"}, {SourcesRest::kFirst, "first"}}};

struct UpcycleConfig {
  struct Target {
    int num_experts = 0, num_experts_per_tok = 0;
    std::int64_t moe_intermediate_size = 0, shared_expert_intermediate_size = 0;  // shared 0 = none
    bool norm_topk_prob = false;
    LayerChoice layers = {};  // that become mixtures
    // The model_type of the mixture; empty = auto: the dense family's that carries the recipe.
    std::string family = {};
  } target;
  struct Experts {
    ExpertMethod method = ExpertMethod::kShuffle;
    SplitOrder split = SplitOrder::kConsecutive;
    std::optional<int> copies;  // empty = auto: ceil(experts * width / dense width)
    double reinit = 0.0;        // floor(reinit * width) neurons of every expert are drawn anew
    ReinitFrom reinit_from = ReinitFrom::kSource;
    ReinitStats reinit_stats = ReinitStats::kMatrix;
    ReinitSets reinit_sets = ReinitSets::kJoint;
    double noise = 0.0;           // standard deviation of normal noise added to kept neurons
    int cluster_markers = 10;     // the most active neurons of a token that count, of experts.method cluster
    double noise_share = 1.0;     // floor(noise_share * width) neurons, chosen by `reinit_sets`, may get it
    std::optional<double> scale;  // empty = auto; multiplies the down projections
  } experts;
  struct Shared {
    SharedMethod method = SharedMethod::kDense;
    SharedGate gate = SharedGate::kAuto;
    // empty = auto: 2 behind a gate, which begins at 1/2; multiplies the down projection.
    std::optional<double> scale;
  } shared;
  struct Router {
    RouterMethod method = RouterMethod::kNormal;
    double std = 0.02;  // of the noise alone, where the rows come from tokens
  } router;
  struct Sources {
    SourcesRest rest = SourcesRest::kAverage;
  } sources = {};
  struct Grow {
    int copies = 0;      // of every expert of a mixture; 0: the source is dense
    double noise = 0.0;  // standard deviation on the router's rows of all copies but the first
  } grow = {};
  bool keep_rest = true;  // attention, norms, embedding and head as in the source; false: drawn anew
  std::int64_t seed = 1;
  std::string origin;
  std::vector<std::string> notes;  // for the start: what was asked for in vain, one sentence each
};

UpcycleConfig read_upcycle_config(const std::filesystem::path& file,
                                  const std::vector<std::string>& overrides);
UpcycleConfig parse_upcycle_config(const std::string& yaml, const std::string& where,
                                   const std::vector<std::string>& overrides);
std::string upcycle_config_reference();  // every key: type, range, default; one line each
std::string upcycle_config_help();       // every key with its meaning, for people
std::string to_yaml(const UpcycleConfig& config);
// Whether something of the mixture is made of what tokens tell about the dense model.
bool asks_for_tokens(const UpcycleConfig& config);

}  // namespace upmoe
