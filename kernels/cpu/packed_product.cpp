#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/packed_products.h"

namespace upmoe::cpu {

void multiply_packed_blocks(Exec& ex, const DenseProduct& p) {
  with_product_types(p.a.dtype, p.c_MN.dtype, [&]<class T, class Out>(T, Out) {
    const PackedProduct<T, Out> packed{p.c_MN.as<Out>(),
                                       {p.a.as<T>(), p.a.shape[1], p.transpose_a},
                                       {p.b.as<T>(), p.b.shape[1], !p.transpose_b},
                                       p.rows(),
                                       p.columns(),
                                       p.depth(),
                                       p.mode,
                                       p.bias_N != nullptr ? p.bias_N->as<T>() : nullptr};
    multiply_products<T>(ex, 1, [&](std::int64_t) { return packed; });
  });
}

bool packed_blocks_have_bf16_instruction() {
  return Packed<bf16>::kPerUnit == 2;
}

}  // namespace upmoe::cpu
