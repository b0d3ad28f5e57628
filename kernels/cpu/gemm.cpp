#include "kernels/ops/gemm.h"

#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/matrix_registers.h"
#include "kernels/cpu/packed_products.h"
#include "kernels/cpu/row_products.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/precision.h"

namespace upmoe::cpu {

namespace {

// The product over nothing: zeros or the bias.
void store_empty_product(const TensorView& c_MN, const ConstTensorView& bias_N) {
  const std::int64_t columns = c_MN.shape[1];
  with_float_type(c_MN.dtype, [&](auto out) {
    using Out = decltype(out);
    with_float_type(bias_N.dtype, [&](auto in) {
      const auto* bias = bias_N.if_given<decltype(in)>();
      for (std::int64_t i = 0; i < c_MN.elements(); ++i)
        c_MN.as<Out>()[i] = from_float<Out>(bias != nullptr ? to_float(bias[i % columns]) : 0.0f);
    });
  });
}

// Of rows with a layer's weight, which is stored [columns, depth].
bool is_of_a_layer(const DenseProduct& p) {
  return !p.a_MK.transposed() && p.b_KN.transposed() && p.mode == Accumulate::kOverwrite;
}

void multiply_row_by_row(const DenseProduct& p) {
  with_product_types(p.a_MK.stored.dtype, p.c_MN.dtype, [&]<class T, class Out>(T, Out) {
    const RowProduct<T, Out> product{p.c_MN.as<Out>(),
                                     p.a_MK.stored.as<T>(),
                                     p.b_KN.stored.as<T>(),
                                     p.bias_N.if_given<T>(),
                                     p.rows(),
                                     p.columns(),
                                     p.depth()};
    multiply_row_products<T, Out>(std::span(&product, 1));
  });
}

// Packed blocks of bf16 pairs are faster than oneDNN's code of the same instructions, in products of large layers and
// in weight gradients above all (bench_ops, dense_*). Where the instructions are hidden from oneDNN
// (ONEDNN_MAX_CPU_ISA), dense products do without them.
ComputeProduct choose_product(DType in, DType out) {
  const bool pairs = packed_blocks_have_bf16_instruction() && onednn_has_bf16_instruction();
  if (in == DType::kBF16 && pairs) return multiply_packed_blocks;
  return onednn_computes(in, out) ? multiply_by_onednn : multiply_packed_blocks;
}

}  // namespace

ComputeProduct product_for(DType in, DType out) {
  static const ComputeProduct of_f32 = choose_product(DType::kF32, DType::kF32);
  static const ComputeProduct of_bf16 = choose_product(DType::kBF16, DType::kBF16);
  static const ComputeProduct of_bf16_to_f32 = choose_product(DType::kBF16, DType::kF32);
  if (in == DType::kF32) return of_f32;
  return out == DType::kF32 ? of_bf16_to_f32 : of_bf16;
}

bool rows_are_independent(DType in, DType out) {
  return product_for(in, out) == multiply_packed_blocks || onednn_has_avx512();
}

void gemm(Exec& ex, TensorView c_MN, const Factor& a_MK, const Factor& b_KN, Accumulate mode,
          ConstTensorView bias_N) {
  const DenseProduct product{c_MN, a_MK, b_KN, mode, bias_N};
  if (c_MN.elements() == 0) return;
  if (product.depth() == 0) {  // oneDNN leaves the output alone then
    if (mode == Accumulate::kOverwrite) store_empty_product(c_MN, bias_N);
    return;
  }
  if (ex.row_by_row && is_of_a_layer(product) && !few_rows_are_packed(a_MK.stored.dtype))
    return multiply_row_by_row(product);
  product_for(a_MK.stored.dtype, c_MN.dtype)(ex, product);
}

void bias_backward(Exec& ex, GradientView db_N, ConstTensorView dy_TN) {
  const std::int64_t rows = dy_TN.shape[0], width = dy_TN.shape[1];
  if (rows == 0 && db_N.adds()) return;
  ScratchScope scope(*ex.scratch);
  auto* partials = ex.scratch->take({row_blocks(rows), width}, DType::kF32, "bias_backward sums").as<float>();
  with_float_type(dy_TN.dtype, [&](auto type) {
    using T = decltype(type);
    const T* dy = dy_TN.as<T>();
    for_row_blocks(partials, rows, width, [&](std::int64_t first, std::int64_t last, float* partial) {
      for (std::int64_t t = first; t < last; ++t)
        for_lanes(width, [&](std::int64_t i, auto lanes) {
          store(partial + i, load(partial + i, lanes) + load(dy + t * width + i, lanes), lanes);
        });
    });
  });
  add_row_blocks(db_N, partials, row_blocks(rows));
}

}  // namespace upmoe::cpu

namespace upmoe {

std::string ops::why_bf16_is_slow() {
  const bool experts = cpu::packed_blocks_have_bf16_instruction();
  const bool dense = cpu::product_for(DType::kBF16, DType::kBF16) == cpu::multiply_by_onednn
                         ? cpu::onednn_has_bf16_instruction()
                         : experts;
  // Where there are such registers, pairs in vectors take twice the time of fp32.
  if (dense && experts) return cpu::why_matrix_registers_are_not_used();
  return fmt::format(
      "no instruction for products of bf16 (AVX512-BF16) is used for {} here: operands are widened to "
      "fp32 first",
      dense     ? "experts"
      : experts ? "dense layers"
                : "any layer");
}

}  // namespace upmoe
