#include "launch/compute_options.h"

namespace upmoe {

Device ComputeOptions::choose_device(Runtime& runtime) const {
  const Device chosen = runtime.choose_device(device);
  remark_on_precision(precision, chosen);
  return chosen;
}

RankModel::Options ComputeOptions::model_options() const {
  return {.dtype = dtype_of(precision), .fp32 = fp32_roles(router), .gradients = false};
}

void add_compute_options(CLI::App& command, ComputeOptions& options) {
  add_choice(command, "--precision", options.precision, "fp32 or bf16");
  add_choice(command, "--router-dtype", options.router, "auto, or fp32: routers in fp32 beside bf16");
  add_choice(command, "--device", options.device, "cpu, cuda, or auto: GPUs where every rank has one");
}

}  // namespace upmoe
