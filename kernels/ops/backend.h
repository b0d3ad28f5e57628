#pragma once
// What a backend is: one function for each op, without checks. Only kernels/ sees this; everybody else calls the
// entries of kernels/ops, which check their arguments, book the cost and pass them on (dispatch.h).

#include "kernels/ops/activation.h"
#include "kernels/ops/adamw.h"
#include "kernels/ops/adamw8bit.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/attention_decode.h"
#include "kernels/ops/balance.h"
#include "kernels/ops/capacity.h"
#include "kernels/ops/distillation.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/experts.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/layer_norm.h"
#include "kernels/ops/loss.h"
#include "kernels/ops/noisy_routing.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pack.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/router_draws.h"
#include "kernels/ops/routing.h"
#include "kernels/ops/sigmoid_routing.h"
#include "kernels/ops/token_groups.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

struct Backend {
#define UPMOE_OP(name) decltype(&ops::name) name;
#include "kernels/ops/op_names.inc"
#undef UPMOE_OP
};

namespace cpu {
const Backend& backend();
#define UPMOE_OP(name) decltype(ops::name) name;
#include "kernels/ops/op_names.inc"
#undef UPMOE_OP
}  // namespace cpu

namespace cuda {
const Backend& backend();  // of a build without CUDA: says so and fails
#define UPMOE_OP(name) decltype(ops::name) name;
#include "kernels/ops/op_names.inc"
#undef UPMOE_OP
}  // namespace cuda

}  // namespace upmoe
