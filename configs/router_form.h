#pragma once
// What a mixture's router computes beside its weight, in words of no family: part of a model, as its function depends
// on it.

#include <cstdint>

#include "configs/names.h"

namespace upmoe {

// Of an expert for a token: its share of a softmax over all experts, or the sigmoid of its own logit.
enum class RouterScore : std::uint8_t { kSoftmax, kSigmoid };
template <>
inline constexpr Names<RouterScore> kNames<RouterScore>{
    .built = {{RouterScore::kSoftmax, "softmax"}, {RouterScore::kSigmoid, "sigmoid"}}};

// What is chosen in training. kNoisy (Shazeer et al. 2017): by logits with noise, of a size that is learnt. kSwitch
// (Fedus et al. 2021): one expert, weighed by its probability over all of them. kGShard (Lepikhin et al. 2020): two,
// the second one with a probability of twice its weight. Outside training as well: kExpertChoice (Zhou et al. 2022),
// where every expert takes its best tokens of a group; kMixtureOfTokens (Antoniak et al. 2023), where every expert
// computes one mixture of a group's tokens.
enum class RouterKind : std::uint8_t { kTopK, kNoisy, kSwitch, kGShard, kExpertChoice, kMixtureOfTokens };
template <>
inline constexpr Names<RouterKind> kNames<RouterKind>{
    .built = {{RouterKind::kTopK, "topk"},
              {RouterKind::kNoisy, "noisy"},
              {RouterKind::kSwitch, "switch"},
              {RouterKind::kGShard, "gshard"},
              {RouterKind::kExpertChoice, "expert_choice"},
              {RouterKind::kMixtureOfTokens, "mixture_of_tokens"}}};

// The tokens that share an expert's capacity.
enum class CapacityPool : std::uint8_t { kSequence, kMicroBatch };
template <>
inline constexpr Names<CapacityPool> kNames<CapacityPool>{
    .built = {{CapacityPool::kSequence, "sequence"}, {CapacityPool::kMicroBatch, "micro_batch"}}};

// Which assignments an expert beyond its capacity drops: the last ones, first choices before second ones; or those of
// the smallest weights.
enum class DropBy : std::uint8_t { kOrder, kProbability };
template <>
inline constexpr Names<DropBy> kNames<DropBy>{
    .built = {{DropBy::kOrder, "order"}, {DropBy::kProbability, "probability"}}};

// Below it an fp32 logit over it is no number.
inline constexpr double kLeastTemperature = 1e-6;

struct RouterForm {
  RouterScore score = RouterScore::kSoftmax;
  // Experts lie in groups of equal size, of which the best `group_topk` may be chosen from.
  int groups = 1, group_topk = 1;
  double scale = 1;  // of the chosen experts' weights
  // In training alone, unless it routes groups: outside it nothing is drawn and nothing dropped.
  RouterKind kind = RouterKind::kTopK;
  double jitter = 0;  // the router's input, element by element, times a factor from 1 - jitter to 1 + jitter
  // An expert takes this times its equal share of a pool's assignments; 0: all. Of kExpertChoice: the experts of a
  // token on the mean; 0: the model's num_experts_per_tok.
  double capacity_factor = 0;
  CapacityPool capacity_pool = CapacityPool::kSequence;
  DropBy drop = DropBy::kOrder;
  // Of kinds that route groups: neighbouring sequences of a micro-batch whose tokens at one position are a group. So
  // nothing looks ahead along time.
  int group_size = 0;
  double temperature = 1;  // of kMixtureOfTokens: what logits are divided by

  // What a token gets depends on the other tokens of its group, outside training too.
  bool routes_groups() const {
    return kind == RouterKind::kExpertChoice || kind == RouterKind::kMixtureOfTokens;
  }
  // What it computes outside training.
  RouterForm served() const {
    RouterForm form{score, groups, group_topk, scale};
    if (!routes_groups()) return form;
    form.kind = kind;
    form.capacity_factor = capacity_factor;
    form.group_size = group_size;
    form.temperature = temperature;
    return form;
  }
  // Whether its training asks which token is which.
  bool knows_tokens() const { return draws() || (capacity_factor > 0 && !routes_groups()); }
  bool draws() const { return jitter > 0 || kind == RouterKind::kGShard || kind == RouterKind::kNoisy; }
  friend bool operator==(const RouterForm&, const RouterForm&) = default;
};

}  // namespace upmoe
