#pragma once
// Weights with the adapters beside them added: w + scale b a.

#include "data/hf_writer.h"

namespace upmoe {

// Reads any box of a parameter of `config`, a model with adapters, as `read` does; a weight that has adapters with
// their products, which are summed in double and added in fp32 before they become of out's dtype. `read` gives the
// adapters as well. The matrices of one expert's adapter lie in memory meanwhile.
ReadTensor with_adapters_merged(const ModelConfig& config, ReadTensor read);

}  // namespace upmoe
