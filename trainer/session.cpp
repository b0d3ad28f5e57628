#include "trainer/session.h"

#include <utility>

#include "configs/lora_record.h"
#include "configs/router_record.h"
#include "configs/trained_model.h"
#include "trainer/batch_deal.h"
#include "trainer/freeze.h"
#include "trainer/optimizer_groups.h"
#include "trainer/stage_cost.h"

namespace upmoe {

MeshSpec mesh_of(const RunConfig& run, int world_size) {
  MeshSpec mesh;
  mesh.tp = run.parallel.tp;
  mesh.pp = run.parallel.pp;
  mesh.cp = run.parallel.cp;
  mesh.ep = run.parallel.ep;
  mesh.etp = run.parallel.etp;
  mesh.dp = static_cast<int>(run.parallel.replicas(world_size));
  const std::vector<std::string> problems = mesh.problems(world_size);
  if (!problems.empty()) {
    fail(ExitCode::kUsage, "parallel: impossible for {} ranks:{}", world_size, listed(problems));
  }
  return mesh;
}

namespace {

RankModel::Options model_options(const RunConfig& run, const ModelConfig& model) {
  RankModel::Options options;
  options.dtype = dtype_of(run.train.precision);
  options.grad_dtype = run.parallel.reduce == Precision::kBf16 ? options.dtype : DType::kF32;
  options.fp32 = fp32_roles(run.router.dtype);
  options.share_block_grads = run.parallel.zero == 2;
  options.recompute = run.train.recompute;
  options.freeze = frozen_names(run.freeze, model);
  options.plan = stages_of(run, model);
  options.node_ranks = run.parallel.node_ranks;
  return options;
}

Optimizer::Config optimizer_of(const RunConfig& run, const ModelConfig& model) {
  const RunConfig::Optimizer& o = run.optimizer;
  Optimizer::Config config{.beta1 = o.beta1,
                           .beta2 = o.beta2,
                           .eps = o.eps,
                           .weight_decay = o.weight_decay,
                           .clip = o.clip,
                           .coded = o.name == OptimizerKind::kAdamW8bit,
                           .offload = o.offload,
                           .seed = static_cast<std::uint64_t>(run.run.seed)};
  if (!o.groups.empty()) config.groups = optimizer_groups(o.groups, model, frozen_names(run.freeze, model));
  return config;
}

}  // namespace

Session::Session(const RunConfig& run_config, const ModelConfig& model, Communicator& world, Device device)
    : RankModel(model, mesh_of(run_config, world.size()), world, device, model_options(run_config, model)),
      run(run_config),
      reducer(params, mesh, device),
      optimizer(params, optimizer_of(run_config, model), device),
      teacher(run.train.teacher.given() ? std::make_unique<Teacher>(run, world, device) : nullptr) {
  memory.exec.deterministic = run_config.train.deterministic;
  memory.exec.experts = run_config.kernels.experts;
  memory.exec.cross_entropy = run_config.kernels.cross_entropy;
}

StartModel open_start(const RunConfig& run, const std::optional<std::filesystem::path>& checkpoint) {
  if (!checkpoint && run.model.init == ModelInit::kRandom)
    return {nullptr, trained_model(run, read_model_config(run.model.path))};
  std::unique_ptr<ModelSource> source = open_model(checkpoint.value_or(run.model.path));
  const ModelConfig config = trained_model(run, source->config());
  require_same_lora(source->config(), config, source->directory().string(), checkpoint.has_value());
  if (checkpoint) require_same_router(source->config(), config, checkpoint->string());
  return {std::move(source), config};
}

std::unique_ptr<TokenDataset> open_training_data(const RunConfig& run, std::int64_t vocab_size) {
  std::vector<TokenDataset::Source> sources;
  for (const DataSource& s : run.data.train) sources.push_back({s.path, s.weight, s.loss_mask});
  return std::make_unique<TokenDataset>(sources, run.data.seq_len, run.data.shuffle,
                                        static_cast<std::uint64_t>(run.data.seed), vocab_size);
}

void Session::open_data(std::int64_t first_sample) {
  data = open_training_data(run, config.vocab_size);
  BatchLoader::Options options;
  options.global_batch = run.train.global_batch;
  options.micro_batch = run.train.micro_batch;
  const Deal deal = deal_of(mesh, run.train.micro_batches());
  options.dp_rank = deal.rank;
  options.dp_size = deal.ranks;
  options.mask_documents = run.data.mask_documents;
  batches = std::make_unique<BatchLoader>(*data, options, first_sample);
}

MemoryUse Session::memory_use() const {
  return {.parameters = params.value_bytes(),
          .gradients = params.gradient_bytes(),
          .optimizer = optimizer.bytes(),
          .activations = pipeline.peak_bytes(),
          .scratch = memory.scratch.peak(),
          .buckets = reducer.bytes(),
          .teacher = teacher != nullptr ? teacher->bytes() : 0};
}

}  // namespace upmoe
