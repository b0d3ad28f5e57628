#include "kernels/ops/product_library.h"

#include <fmt/format.h>
#include <oneapi/dnnl/dnnl.h>

namespace upmoe::ops {

std::string product_library() {
  const dnnl_version_t* v = dnnl_version();
  return fmt::format("oneDNN {}.{}.{}", v->major, v->minor, v->patch);
}

}  // namespace upmoe::ops
