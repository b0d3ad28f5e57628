#pragma once
// Both backends' functions, for the entries in kernels/ops and for the backends themselves.

#include <span>

#include "kernels/core/exec.h"
#include "kernels/ops/adamw.h"
#include "kernels/ops/adamw8bit.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/expert_rows.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/vocab_shard.h"

namespace upmoe::cpu {
#include "kernels/ops/backend_functions.inc"
}
namespace upmoe::cuda {
#include "kernels/ops/backend_functions.inc"
}
