#include "trainer/rank_model.h"

#include "configs/expert_variants.h"
#include "configs/product_algorithms.h"
#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "kernels/ops/precision.h"
#include "trainer/model/make_transformer.h"

namespace upmoe {

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
    exec.algorithms = &committed_product_algorithms();
    exec.expert_variants = &committed_expert_variants();
  } else if (world != nullptr) {
    stream = world->make_stream();
  }
  exec.device = device;
  exec.stream = stream.get();
  exec.scratch = &scratch;
  exec.ledger = &ledger;
}

namespace {

StagePlan plan_of(const ModelConfig& config, const MeshSpec& spec, const RankModel::Options& options) {
  const StagePlan plan = options.plan.value_or(one_stage(config.num_hidden_layers));
  UPMOE_CHECK(plan.stages == spec.pp, "a plan of {} stages for a mesh of pp {}", plan.stages, spec.pp);
  UPMOE_CHECK(!plan.chunks.empty() && plan.chunks.front().begin == 0 &&
                  plan.chunks.back().end == config.num_hidden_layers,
              "a plan of other than {} blocks", config.num_hidden_layers);
  return plan;
}

ParamStore::Options storage_of(const RankModel::Options& options, Device device) {
  ParamStore::Options storage;
  storage.dtype = options.dtype;
  storage.grad_dtype = options.grad_dtype;
  storage.fp32 = options.fp32;
  storage.share_block_grads = options.share_block_grads;
  storage.device = device;
  storage.gradients = options.gradients;
  storage.freeze = options.freeze;
  return storage;
}

}  // namespace

RankModel::RankModel(const ModelConfig& model, const MeshSpec& spec, Communicator& world, Device device,
                     const Options& options)
    : config(model),
      memory(device, &world),
      mesh(spec, world, options.node_ranks),
      plan(plan_of(model, spec, options)),
      params(model, spec, plan, world.rank(), storage_of(options, device)),
      chunks(make_chunks(model, params, mesh, plan, options.recompute)),
      pipeline(model, mesh, plan, chunks, device) {}

}  // namespace upmoe
