#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/packed_products.h"

namespace upmoe::cpu {

void multiply_packed_blocks(Exec& ex, const DenseProduct& p) {
  with_product_types(p.a_MK.stored.dtype, p.c_MN.dtype, [&]<class T, class Out>(T, Out) {
    const PackedProduct<T, Out> packed{p.c_MN.as<Out>(),
                                       {p.a_MK.stored.as<T>(), p.a_MK.stored.shape[1], p.a_MK.transposed()},
                                       {p.b_KN.stored.as<T>(), p.b_KN.stored.shape[1], !p.b_KN.transposed()},
                                       p.rows(),
                                       p.columns(),
                                       p.depth(),
                                       p.mode,
                                       p.bias_N.if_given<T>()};
    multiply_products<T>(ex, 1, [&](std::int64_t) { return packed; });
  });
}

bool packed_blocks_have_bf16_instruction() {
  return kPerUnit<UnitOf<bf16>> == 2;
}

}  // namespace upmoe::cpu
