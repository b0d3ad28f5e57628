#include "kernels/ops/backend.h"

namespace upmoe {

const Backend& cpu::backend() {
  static constexpr Backend functions{
#define UPMOE_OP(name) .name = &cpu::name,
#include "kernels/ops/op_names.inc"
#undef UPMOE_OP
  };
  return functions;
}

}  // namespace upmoe
