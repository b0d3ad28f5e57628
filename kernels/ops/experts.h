#pragma once
// The routed experts' steps where several are taken at once. expert_ffn.h has the whole of them, with its formulas, and
// the other way: gathers, products and SwiGLU one after the other.
//
// R rows lie expert by expert; G = 2F, gates and ups of a neuron side by side. On a GPU these ops take what
// fuses_experts() says yes to; the CPU takes every shape, fp32 and bf16, by its ops for the single steps.

#include "kernels/ops/expert_rows.h"
#include "kernels/ops/expert_shape.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/low_rank.h"

namespace upmoe::ops {

// Row i is row index_R[i] / divisor of from_XD; without an index (int32), row i itself.
struct PickedRows {
  ConstTensorView from_XD, index_R;
  std::int64_t divisor = 1;
};

struct ExpertFfn {
  ConstTensorView gate_up_eGD, down_eDF;
  ConstTensorView weight_R;  // fp32
  ExpertRows rows;
  bool fused = false;                               // by the ops of this file, which know no adapters
  LowRank gate_up_adapter = {}, down_adapter = {};  // each may be absent
};

// Whether ex's device computes such experts by the ops below, as ex.experts asks for. Where it asks in vain the log
// says why, once. The dry device stands for a GPU that has them.
bool fuses_experts(const Exec& ex, const ExpertShape& shape);

// gate_up = x w_gate_up^T, h = weight * SwiGLU(gate_up).
void experts_up(Exec& ex, TensorView gate_up_RG, TensorView h_RF, const PickedRows& x, const ExpertFfn& f);

// out_RN = in_RK op(w_e..) of each row's expert. kYes: w is [e, N, K], a Linear forward; kNo: [e, K, N], its dx.
void experts_rows(Exec& ex, TensorView out_RN, ConstTensorView in_RK, ConstTensorView w,
                  Transpose transpose_w, const ExpertRows& rows);

// From dh = dy w_down, which stays in registers: the gradient of gate_up, h = weight * SwiGLU(gate_up) once more, and
// dweight = <dh, SwiGLU(gate_up)> (fp32).
struct HiddenGradients {
  TensorView dgate_up_RG, h_RF, dweight_R;
};
void experts_dhidden(Exec& ex, const HiddenGradients& g, const PickedRows& dy, ConstTensorView gate_up_RG,
                     const ExpertFfn& f);

// dw_eNK (+)= dy^T x over each expert's rows; zeros of an expert without rows, where it overwrites. At most one of the
// two has an index.
void experts_wgrad(Exec& ex, TensorView dw_eNK, const PickedRows& dy, const PickedRows& x,
                   const ExpertRows& rows, Accumulate mode);

}  // namespace upmoe::ops
