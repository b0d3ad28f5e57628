#pragma once
// One dense product, and who can compute it: oneDNN where it has code for the processor, packed blocks everywhere.

#include "kernels/core/exec.h"
#include "kernels/ops/gemm.h"

namespace upmoe::cpu {

// What ops::gemm takes; none of the three sizes is 0.
struct DenseProduct {
  TensorView c_MN;
  Factor a_MK, b_KN;
  Accumulate mode;
  ConstTensorView bias_N;
  std::int64_t rows() const { return c_MN.shape[0]; }
  std::int64_t columns() const { return c_MN.shape[1]; }
  std::int64_t depth() const { return a_MK.columns(); }
};

using ComputeProduct = void (*)(Exec&, const DenseProduct&);

// Fails where oneDNN has no code for these dtypes on this processor.
void multiply_by_onednn(Exec& ex, const DenseProduct& product);

// Every dtype on every processor.
void multiply_packed_blocks(Exec& ex, const DenseProduct& product);

// Whether oneDNN has code for products of these dtypes here. What counts is what it makes of the processor:
// ONEDNN_MAX_CPU_ISA may hide instructions from it.
bool onednn_computes(DType in, DType out);
bool onednn_has_avx512();

// Whether products of bf16 use an instruction for pairs of bf16, without which each costs what one of fp32
// costs, and the widening of its operands on top.
bool onednn_has_bf16_instruction();
bool packed_blocks_have_bf16_instruction();
bool onednn_has_matrix_registers();  // AMX, which multiplies bf16 several times as fast

// Whether a row of these products is the same to the bit wherever it stands and however many are computed with
// it. Below AVX-512, oneDNN sums fp32 products in another order for the last rows and for other numbers of rows.
bool rows_are_independent(DType in, DType out);

// The one of the two that computes products of these dtypes; chosen once for the process.
ComputeProduct product_for(DType in, DType out);

}  // namespace upmoe::cpu
