#include "kernels/ops/product_library.h"

#include <fmt/format.h>
#include <oneapi/dnnl/dnnl.h>

#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/matrix_registers.h"

namespace upmoe::ops {

namespace {

const char* bf16_products() {
  if (cpu::has_matrix_registers()) return "in matrix registers (AMX)";
  const bool experts = cpu::packed_blocks_have_bf16_instruction(), dense = cpu::onednn_has_bf16_instruction();
  if (experts && dense) return "in pairs (AVX512-BF16)";
  return experts ? "in pairs (AVX512-BF16) for experts"
         : dense ? "in pairs for dense layers"
                 : "widened to fp32";
}

}  // namespace

std::string product_library() {
  const dnnl_version_t* v = dnnl_version();
  return fmt::format("oneDNN {}.{}.{}, bf16 {}", v->major, v->minor, v->patch, bf16_products());
}

}  // namespace upmoe::ops
