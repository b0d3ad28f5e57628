#include "trainer/session.h"

#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "kernels/ops/precision.h"
#include "trainer/freeze.h"

namespace upmoe {

MeshSpec mesh_of(const RunConfig& run, int world_size) {
  MeshSpec mesh;
  mesh.tp = run.parallel.tp;
  mesh.pp = run.parallel.pp;
  mesh.cp = run.parallel.cp;
  mesh.ep = run.parallel.ep;
  mesh.etp = run.parallel.etp;
  mesh.dp = world_size / (mesh.tp * mesh.pp * mesh.cp);
  const std::vector<std::string> problems = mesh.problems(world_size);
  if (!problems.empty()) {
    std::string all;
    for (const std::string& p : problems) all += "\n  " + p;
    fail(ExitCode::kUsage, "parallel: impossible for {} ranks:{}", world_size, all);
  }
  return mesh;
}

namespace {

ParamStore::Options storage_of(const RunConfig& run, const ModelConfig& model, Device device) {
  ParamStore::Options options;
  options.dtype = dtype_of(run.train.precision);
  options.grad_dtype = run.parallel.reduce == Precision::kBf16 ? options.dtype : DType::kF32;
  options.fp32 = fp32_roles(run.router.dtype);
  options.share_block_grads = run.parallel.zero == 2;
  options.device = device;
  options.freeze = frozen_names(run.freeze, model);
  return options;
}

Optimizer::Config optimizer_of(const RunConfig& run) {
  return {run.optimizer.beta1,   run.optimizer.beta2,
          run.optimizer.eps,     run.optimizer.weight_decay,
          run.optimizer.clip,    run.optimizer.name == OptimizerKind::kAdamW8bit,
          run.optimizer.offload, static_cast<std::uint64_t>(run.run.seed)};
}

}  // namespace

void remark_on_precision(Precision precision, Device device) {
  if (precision != Precision::kBf16 || device.type != DeviceType::kCpu) return;
  const std::string reason = ops::why_bf16_is_slow();
  if (!reason.empty())
    log::info(
        "bf16 is slower than fp32 on this processor: {}. It takes half the memory for weights and "
        "activations",
        reason);
}

RankMemory::RankMemory(Device device, Communicator* world)
    : scratch(device, arena_address_space(device), "scratch") {
  if (device.type == DeviceType::kCuda) {
    stream = gpu::make_stream();
  } else if (world != nullptr) {
    stream = world->make_stream();
  }
  exec.device = device;
  exec.stream = stream.get();
  exec.scratch = &scratch;
  exec.ledger = &ledger;
}

Session::Session(const RunConfig& run_config, const ModelConfig& model_config, Communicator& world,
                 Device device)
    : run(run_config),
      config(model_config),
      memory(device, &world),
      mesh(mesh_of(run_config, world.size()), world, run_config.parallel.node_ranks),
      plan(stages_of(run_config, model_config)),
      params(model_config, mesh.spec(), plan, world.rank(), storage_of(run_config, model_config, device)),
      chunks(make_chunks(model_config, params, mesh, plan, run_config.train.recompute)),
      pipeline(model_config, mesh, plan, chunks, device),
      reducer(params, mesh, device),
      optimizer(params, optimizer_of(run_config), device) {
  memory.exec.deterministic = run_config.train.deterministic;
}

void Session::open_data(std::int64_t first_sample) {
  std::vector<TokenDataset::Source> sources;
  for (const DataSource& s : run.data.train) sources.push_back({s.path, s.weight});
  data = std::make_unique<TokenDataset>(sources, run.data.seq_len, run.data.shuffle,
                                        static_cast<std::uint64_t>(run.data.seed), config.vocab_size);
  BatchLoader::Options options;
  options.global_batch = run.train.global_batch;
  options.micro_batch = run.train.micro_batch;
  options.dp_rank = mesh.coord(Axis::kDp);
  options.dp_size = mesh.spec().dp;
  options.mask_documents = run.data.mask_documents;
  loader = std::make_unique<BatchLoader>(*data, options, first_sample);
}

}  // namespace upmoe
