#include "configs/run_problems.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "configs/expert_use.h"
#include "configs/lora_record.h"
#include "configs/router_record.h"
#include "configs/teacher_record.h"
#include "kernels/core/exchange_nodes.h"

namespace upmoe {

std::int64_t ranks_without_experts(const RunConfig::Parallel& parallel, const ModelConfig& model) {
  if (model.num_moe_layers() == 0) return 0;
  return std::max<std::int64_t>(0, parallel.ep - model.num_experts);
}

std::vector<std::int64_t> divisors(std::int64_t n, std::int64_t most) {
  std::vector<std::int64_t> all;
  for (std::int64_t d = 1; d <= std::min(n, most); ++d) {
    if (n % d == 0) all.push_back(d);
  }
  return all;
}
namespace {

// Collects sentences about one run, one model and a number of ranks.
class Problems {
 public:
  Problems(const RunConfig& run, const ModelConfig& model, int world)
      : run_(run), p_(run.parallel), model_(model), world_(world) {}

  std::vector<std::string> find() {
    if (world_ < 1) add("{} ranks", world_);
    check_mesh();
    if (!found_.empty()) return found_;  // dp would be another number
    check_tensor_axis();
    check_context_axis();
    check_stages();
    check_experts();
    check_batch();
    check_model();
    for (std::string& p : router_problems(run_.router, model_)) found_.push_back(std::move(p));
    for (std::string& p : lora_problems(run_, model_)) found_.push_back(std::move(p));
    return found_;
  }

 private:
  template <class... Args>
  void add(fmt::format_string<Args...> text, Args&&... args) {
    found_.push_back(fmt::format(text, std::forward<Args>(args)...));
  }
  // In 128 bits: three degrees of up to 2^31 - 1 each.
  __int128 per_replica() const { return static_cast<__int128>(p_.pp) * p_.cp * p_.tp; }
  std::int64_t dp() const { return static_cast<std::int64_t>(world_ / per_replica()); }

  void check_mesh() {
    for (const auto& [name, n] :
         {std::pair{"tp", p_.tp}, {"pp", p_.pp}, {"cp", p_.cp}, {"ep", p_.ep}, {"etp", p_.etp}})
      if (n < 1) add("parallel.{}: {}, expected at least 1", name, n);
    if (!found_.empty() || world_ < 1) return;
    if (world_ % per_replica() == 0) return;
    add("parallel: tp {} x pp {} x cp {} = {} does not divide the {} ranks of "
        "this run; start a multiple of {}, or make one of the three smaller",
        p_.tp, p_.pp, p_.cp, per_replica(), world_, per_replica());
  }

  void check_tensor_axis() {
    if (p_.tp == 1) return;
    for (std::string& problem : tensor_axis_problems("parallel.tp", p_.tp, model_))
      found_.push_back(std::move(problem));
    if (run_.data.seq_len / p_.cp % p_.tp != 0)
      add("parallel.tp: {} does not divide the {} tokens of a sequence "
          "that a rank of cp {} has; data.seq_len must be a multiple of {}",
          p_.tp, run_.data.seq_len / p_.cp, p_.cp, p_.tp * p_.cp * (p_.cp > 1 ? 2 : 1));
  }

  void check_context_axis() {
    // Two chunks for each rank, an early and a late one, so that causal attention is the same work for all.
    if (p_.cp > 1 && run_.data.seq_len % (2 * std::int64_t{p_.cp}) != 0)
      add("parallel.cp: {} ranks cut a sequence into {} chunks, which data.seq_len {} does not give; use a "
          "multiple "
          "of {}",
          p_.cp, 2 * p_.cp, run_.data.seq_len, 2 * p_.cp);
  }

  void check_stages() {
    const std::int64_t chunks = std::int64_t{p_.pp} * p_.pp_chunks;
    if (chunks > model_.num_hidden_layers)
      add("parallel.pp: {} stages x pp_chunks {} for {} layers; each needs one", p_.pp, p_.pp_chunks,
          model_.num_hidden_layers);
    if (p_.pp == 1 && p_.pp_chunks > 1)
      add("parallel.pp_chunks: {} without a pipeline; use 1, or pp above 1", p_.pp_chunks);
    const std::int64_t micro = run_.train.micro_batch, global = run_.train.global_batch;
    if (p_.pp == 1 || p_.pp_chunks == 1 || micro < 1 || global % micro != 0) return;
    // Of the rank that gets the most; the others go through the same rounds, some of them without tokens.
    const std::int64_t rounds = (global / micro + dp() - 1) / dp();
    if (rounds % p_.pp != 0)
      add("parallel.pp_chunks: interleaved stages take micro-batches in "
          "groups of pp = {}, and each data-parallel rank has {} of them; "
          "change train.global_batch or train.micro_batch, or use pp_chunks 1",
          p_.pp, rounds);
  }

  void check_experts() {
    const std::int64_t stage = world_ / p_.pp;
    if ((p_.ep > 1 || p_.etp > 1) && model_.num_moe_layers() == 0) {
      add("parallel.ep: {}, parallel.etp: {}, but {} has no expert layers; use 1", p_.ep, p_.etp,
          run_.model.path);
      return;
    }
    check_nodes();
    if (p_.etp > 1 && p_.etp > model_.moe_intermediate_size)
      add("parallel.etp: {} ranks for the model's moe_intermediate_size of {}", p_.etp,
          model_.moe_intermediate_size);
    if (stage % p_.etp != 0) {
      add("parallel.etp: {} does not divide the {} ranks of {}; possible: {}", p_.etp, stage, whose_ranks(),
          fmt::join(divisors(stage, stage), ", "));
    } else if (stage / p_.etp % p_.ep != 0) {
      add("parallel.ep: {} does not divide the {} ranks of {}{}; possible: {}", p_.ep, stage / p_.etp,
          whose_ranks(), p_.etp > 1 ? fmt::format(" that etp {} leaves", p_.etp) : "",
          fmt::join(divisors(stage / p_.etp, stage / p_.etp), ", "));
    }
  }
  void check_nodes() {
    if (p_.node_ranks == 0) return;
    if (p_.etp > 1)
      add("parallel.node_ranks: {} with etp {}: rows of cut experts go straight to their ranks; use etp 1 or "
          "node_ranks 0",
          p_.node_ranks, p_.etp);
    if (p_.ep % p_.node_ranks != 0) {
      add("parallel.node_ranks: {} does not divide parallel.ep = {}; possible: 0, {}", p_.node_ranks, p_.ep,
          fmt::join(divisors(p_.ep, p_.ep), ", "));
    } else if (p_.ep / p_.node_ranks > kMostNodesOfAGpu && run_.device != DeviceChoice::kCpu) {
      std::vector<std::int64_t> possible = divisors(p_.ep, p_.ep);
      std::erase_if(possible, [&](std::int64_t ranks) { return p_.ep / ranks > kMostNodesOfAGpu; });
      add("parallel.node_ranks: {} makes {} nodes of parallel.ep = {}, and GPUs exchange rows between at "
          "most {}; possible: 0, {}; on CPUs say device: cpu",
          p_.node_ranks, p_.ep / p_.node_ranks, p_.ep, kMostNodesOfAGpu, fmt::join(possible, ", "));
    }
  }
  std::string whose_ranks() const { return p_.pp == 1 ? "this run" : "a pipeline stage"; }

  void check_batch() {
    const std::int64_t global = run_.train.global_batch, micro = run_.train.micro_batch;
    if (micro < 1 || global < 1 || global % micro != 0) {
      add("train.micro_batch: {} does not divide train.global_batch = {}", micro, global);
      return;
    }
    const std::int64_t batches = global / micro;
    if (dp() <= batches) return;
    std::string cure = fmt::format("use at most {} ranks", batches * per_replica());
    const std::vector<std::int64_t> sizes = divisors(global, std::min<std::int64_t>(global / dp(), 1 << 20));
    if (!sizes.empty()) cure += fmt::format(", or train.micro_batch {}", fmt::join(sizes, " or "));
    add("{} data-parallel ranks, but train.global_batch {} / train.micro_batch {} makes only {} "
        "micro-batches per step, so some ranks would never get one; {}",
        dp(), global, micro, batches, cure);
  }

  void check_model() {
    if (run_.data.seq_len > model_.max_position_embeddings)
      add("data.seq_len: {} is longer than the model's max_position_embeddings = {}", run_.data.seq_len,
          model_.max_position_embeddings);
    if (run_.train.precision == Precision::kFp32 && p_.reduce == Precision::kBf16)
      add("parallel.reduce: bf16 would round gradients that train.precision fp32 keeps; use fp32");
    if (model_.num_moe_layers() > 0 &&
        (model_.num_experts_per_tok < 1 || model_.num_experts_per_tok > model_.num_experts))
      add("the model's num_experts_per_tok is {}, expected 1 to {} (num_experts)", model_.num_experts_per_tok,
          model_.num_experts);
    const std::int64_t group = least_sequences(model_);
    if (run_.train.micro_batch % group != 0)
      add("router.group_size: {} sequences are routed together, "
          "and train.micro_batch is {}; use a multiple of {}",
          group, run_.train.micro_batch, group);
  }

  const RunConfig& run_;
  const RunConfig::Parallel& p_;
  const ModelConfig& model_;
  int world_;
  std::vector<std::string> found_;
};

}  // namespace

std::vector<std::string> tensor_axis_problems(const std::string& key, int tp, const ModelConfig& model) {
  std::vector<std::string> found;
  const std::int64_t heads = model.num_attention_heads, kv = model.num_key_value_heads;
  // Query heads are cut evenly. Key/value heads too, or each is held by equally many ranks: then a rank's query heads
  // always have their key/value head with them.
  const auto fits = [&](std::int64_t n) { return heads % n == 0 && (kv % n == 0 || n % kv == 0); };
  if (!fits(tp)) {
    std::vector<std::int64_t> possible;
    for (const std::int64_t d : divisors(heads, heads))
      if (fits(d)) possible.push_back(d);
    found.push_back(
        fmt::format("{}: {} does not divide the model's {} attention heads and {} key/value heads among its "
                    "ranks; possible: {}",
                    key, tp, heads, kv, fmt::join(possible, ", ")));
  }
  for (const auto& [what, width] :
       {std::pair{"vocab_size", model.vocab_size},
        {"intermediate_size", model.intermediate_size},
        {"shared_expert_intermediate_size", model.shared_expert_intermediate_size}})
    if (width > 0 && tp > width)
      found.push_back(fmt::format("{}: {} ranks for the model's {} of {}", key, tp, what, width));
  return found;
}

RunConfig on_device(RunConfig run, Device device) {
  run.device = device.type == DeviceType::kCpu ? DeviceChoice::kCpu : DeviceChoice::kCuda;
  return run;
}

std::vector<std::string> problems_of(const RunConfig& run, const ModelConfig& model, int world_size) {
  std::vector<std::string> found = Problems(run, model, world_size).find();
  for (std::string& p : teacher_problems(run, model, world_size, found)) found.push_back(std::move(p));
  return found;
}

}  // namespace upmoe
