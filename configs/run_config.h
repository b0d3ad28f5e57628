#pragma once
// What a training run is: the YAML file of `upmoe train`, as plain data. Keys and defaults are a
// contract, held by tests/configs/frozen_keys_test.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "configs/lora_form.h"
#include "configs/router_form.h"
#include "configs/run_choices.h"

namespace upmoe {

struct ModelConfig;

struct DataSource {
  std::string path;
  double weight = 1.0;
  bool loss_mask = false;  // targets that the file's mask leaves out do not count
};

struct HeldOutSet {
  std::string name;  // empty: the only one
  std::string path;
};

// Parameters that are updated otherwise than the rest; what is not given is as of the rest.
struct OptimizerGroup {
  std::vector<std::string> match;  // as RunConfig::freeze
  std::optional<double> lr = {}, weight_decay = {};
};

struct RunConfig {
  struct Run {
    std::string dir;
    std::int64_t seed = 1;
  } run;
  struct Model {
    std::string path;
    ModelInit init = ModelInit::kWeights;
  } model;
  struct Router {
    // Balance terms, each with its coefficient; added up.
    std::vector<AuxKind> aux_kind = {AuxKind::kHf};
    std::vector<double> aux_loss = {0.001};
    int aux_groups = 1;                 // of experts, for AuxKind::kGroup
    bool has_term(AuxKind term) const;  // with a coefficient above 0
    double z_loss = 0, bias_rate = 0;
    // RouterForm of the model that trains; empty: as that of model.path.
    std::optional<RouterScore> score = {};
    std::optional<int> groups = {}, group_topk = {};
    std::optional<double> scale = {};
    std::optional<RouterKind> kind = {};
    std::optional<double> jitter = {}, capacity_factor = {};
    std::optional<CapacityPool> capacity_pool = {};
    std::optional<DropBy> drop = {};
    std::optional<int> group_size = {};
    std::optional<double> temperature = {};
    RouterDType dtype = RouterDType::kAuto;
  } router;
  struct Data {
    std::vector<DataSource> train;
    std::vector<HeldOutSet> valid;  // empty: no held-out evaluation
    bool valid_loss_mask = false;   // as DataSource::loss_mask
    std::int64_t seq_len = 0;
    bool shuffle = true, mask_documents = false;
    std::int64_t seed = 1;
  } data;
  struct Train {
    std::int64_t steps = 0, global_batch = 0, micro_batch = 0;  // batches in sequences
    Precision precision = Precision::kFp32;
    Recompute recompute = Recompute::kNone;
    // Two runs of one layout have the same bits. false: on GPUs, attention may sum its gradient in any order.
    bool deterministic = true;
    std::int64_t eval_every = 0;       // held-out evaluation every n steps; 0 = at the end only
    std::int64_t eval_sequences = 64;  // of each set of data.valid, per evaluation; 0 = all
    // Consecutive non-finite steps skipped before the run stops with status 4.
    std::int64_t nonfinite_patience = 3;
    // Whose logits the model learns from beside the data's targets (kernels/ops/distillation.h).
    struct Teacher {
      std::string model;       // empty: none
      double weight = 0.5;     // of the divergence in the loss; the cross entropy has the rest
      double temperature = 1;  // of both models' softmaxes
      // Of that model, once it has been read (trainer/teacher.h); no key.
      std::shared_ptr<const ModelConfig> config = {};
      bool given() const { return !model.empty(); }
    } teacher;

    std::int64_t micro_batches() const { return global_batch / micro_batch; }  // of a step, all ranks
  } train;
  struct Optimizer {
    OptimizerKind name = OptimizerKind::kAdamW;
    double lr = 3e-4, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, clip = 1.0;  // clip 0 = none
    bool offload = false;                     // on GPUs: masters and moments in the host's memory
    std::vector<OptimizerGroup> groups = {};  // the first one that catches a parameter counts
  } optimizer;
  struct Schedule {
    ScheduleKind name = ScheduleKind::kCosine;
    std::int64_t warmup = 0;      // steps
    double min_lr_ratio = 0.1;    // of the learning rate, at the last step
    double decay_fraction = 0.1;  // wsd: share of the steps, at the end, that the linear decay takes
  } schedule;
  struct Parallel {
    int tp = 1, pp = 1, cp = 1, ep = 1, etp = 1;
    // 1: each rank updates its part of what it holds. 2: and blocks share their gradients' memory, which
    // every micro-batch leaves reduced.
    int zero = 1;
    Precision reduce = Precision::kFp32;  // in what gradients are added up, over micro-batches and ranks
    // Ranks per node for the exchange of expert rows: a row crosses to another node once. 0: straight to its rank.
    int node_ranks = 0;
    int pp_chunks = 1;  // runs of blocks per pipeline stage; above 1 the schedule is interleaved

    // Of so many ranks: data-parallel replicas of the model, dp.
    std::int64_t replicas(int world) const { return world / (std::int64_t{tp} * pp * cp); }
  } parallel;
  struct Kernels {
    ExpertsPath experts = ExpertsPath::kAuto;
    CrossEntropyPath cross_entropy = CrossEntropyPath::kAuto;
  } kernels;
  struct Lora : LoraForm {
    double dropout = 0;  // of what an adapter reads
  } lora;
  std::vector<std::string> freeze;  // shell-style patterns over parameter names, ours or Hugging Face's
  struct Checkpoint {
    std::int64_t every = 0;  // 0 = at the end only
    int keep = 3;
    std::int64_t keep_every = 0;  // those of its multiples stay for good; 0 = none
    bool async = true;
  } checkpoint;
  struct Log {
    std::int64_t every = 1;
    bool tensorboard = true;
  } log;
  DeviceChoice device = DeviceChoice::kAuto;

  std::int64_t tokens_per_step() const { return train.global_batch * data.seq_len; }  // of all ranks

  std::string origin;              // the file it came from, for messages
  std::vector<std::string> notes;  // for the start of the run: what was asked for in vain, one sentence each
};

// Reads YAML strictly, then applies `section.key=value` overrides. Throws Error(kUsage) that lists every
// problem with file, line and the nearest valid key. Relative paths stay relative to the working directory;
// in all paths ~ and ${NAME} are filled in (path_text.h).
RunConfig read_run_config(const std::filesystem::path& file, const std::vector<std::string>& overrides);
RunConfig parse_run_config(const std::string& yaml, const std::string& where,
                           const std::vector<std::string>& overrides);
bool masks_targets(const RunConfig::Data& data);  // of any training file
std::string run_config_reference();               // every key: type, range, default; one line each
std::string run_config_help();                    // every key with its meaning, for people
std::string to_yaml(const RunConfig& run);        // the resolved configuration; reading it gives the same run

}  // namespace upmoe
