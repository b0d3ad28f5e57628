// What can be wrong between a run, its model and the number of ranks.

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "configs/model_config.h"
#include "configs/run_config.h"

namespace upmoe {
namespace {

std::vector<std::int64_t> divisors(std::int64_t n, std::int64_t most) {
  std::vector<std::int64_t> all;
  for (std::int64_t d = 1; d <= std::min(n, most); ++d) {
    if (n % d == 0) all.push_back(d);
  }
  return all;
}

void check_expert_axis(const RunConfig& run, const ModelConfig& model, int world,
                       std::vector<std::string>& problems) {
  const int ep = run.parallel.ep;
  if (ep > 1 && model.num_moe_layers() == 0) {
    problems.push_back(
        fmt::format("parallel.ep: {}, but {} has no expert layers; use ep 1", ep, run.model.path));
    return;
  }
  const std::int64_t most = model.num_moe_layers() > 0 ? model.num_experts : 1;
  if (ep > most) {
    problems.push_back(
        fmt::format("parallel.ep: {} ranks for {} experts leave some without any; use at most {}", ep,
                    model.num_experts, most));
  }
  if (ep < 1 || world % ep != 0) {
    problems.push_back(fmt::format("parallel.ep: {} does not divide the {} ranks of this run; possible: {}",
                                   ep, world, fmt::join(divisors(world, most), ", ")));
  }
}

void check_batch(const RunConfig& run, int world, std::vector<std::string>& problems) {
  const std::int64_t global = run.train.global_batch, micro = run.train.micro_batch;
  if (micro < 1 || global < 1 || global % micro != 0) {
    problems.push_back(
        fmt::format("train.micro_batch: {} does not divide train.global_batch = {}", micro, global));
    return;
  }
  const std::int64_t batches = global / micro;
  if (world <= batches) return;
  std::string cure = fmt::format("use at most {} ranks", batches);
  std::vector<std::int64_t> sizes = divisors(global, std::min<std::int64_t>(global / world, 1 << 20));
  if (!sizes.empty()) cure += fmt::format(", or train.micro_batch {}", fmt::join(sizes, " or "));
  problems.push_back(
      fmt::format("{} data-parallel ranks, but train.global_batch {} / train.micro_batch {} makes only {} "
                  "micro-batches per step, so some ranks would never get one; {}",
                  world, global, micro, batches, cure));
}

}  // namespace

std::vector<std::string> problems_of(const RunConfig& run, const ModelConfig& model, int world_size) {
  std::vector<std::string> problems;
  if (world_size < 1) problems.push_back(fmt::format("{} ranks", world_size));
  const auto& p = run.parallel;
  const std::pair<const char*, int> unbuilt[] = {{"tp", p.tp}, {"pp", p.pp}, {"cp", p.cp}, {"etp", p.etp}};
  for (const auto& [name, size] : unbuilt) {
    if (size != 1) problems.push_back(fmt::format("parallel.{}: {} is not built yet; use 1", name, size));
  }
  if (!problems.empty()) return problems;  // dp would be another number
  check_expert_axis(run, model, world_size, problems);
  check_batch(run, world_size, problems);
  if (run.data.seq_len > model.max_position_embeddings) {
    problems.push_back(fmt::format("data.seq_len: {} is longer than the model's max_position_embeddings = {}",
                                   run.data.seq_len, model.max_position_embeddings));
  }
  if (model.num_moe_layers() > 0 &&
      (model.num_experts_per_tok < 1 || model.num_experts_per_tok > model.num_experts)) {
    problems.push_back(fmt::format("the model's num_experts_per_tok is {}, expected 1 to {} (num_experts)",
                                   model.num_experts_per_tok, model.num_experts));
  }
  if (run.model.init != "weights" && run.model.init != "random") {
    problems.push_back(fmt::format("model.init: {} is not one of weights, random", run.model.init));
  }
  return problems;
}

}  // namespace upmoe
