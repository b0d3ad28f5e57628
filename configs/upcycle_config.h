#pragma once
// An upcycling recipe: the YAML file of `upmoe upcycle`, as plain data. Keys are a contract.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace upmoe {

struct UpcycleConfig {
  struct Target {
    int num_experts = 0, num_experts_per_tok = 0;
    std::int64_t moe_intermediate_size = 0, shared_expert_intermediate_size = 0;  // shared 0 = none
    bool norm_topk_prob = false;
  } target;
  struct Experts {
    std::string method = "shuffle";  // copy | split | shuffle | virtual_group | random
    std::optional<int> copies;       // empty = auto: ceil(experts * width / dense width)
    double reinit = 0.0;             // floor(reinit * width) neurons of every expert are drawn anew
    std::string reinit_from =
        "source";  // source: mean and deviation of the source matrix | config: initializer_range
    std::string reinit_sets = "joint";  // joint: whole neurons | per_matrix: an independent set per matrix
    double noise = 0.0;                 // standard deviation of normal noise added to kept neurons
    std::optional<double> scale;        // empty = auto; multiplies the down projections
  } experts;
  struct Shared {
    std::string method = "dense";  // dense | random | shuffle | zero | none
    double scale = 2.0;            // multiplies the shared down projection
  } shared;
  struct Router {
    std::string method = "normal";  // normal | zero | virtual_group | uniform
    double std = 0.02;
  } router;
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

}  // namespace upmoe
