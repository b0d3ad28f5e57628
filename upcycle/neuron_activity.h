#pragma once
// Which neurons of a dense FFN tokens make active, and the experts and routers that follow.

#include <vector>

#include "configs/upcycle_config.h"
#include "upcycle/calibration.h"
#include "upcycle/clustering.h"
#include "upcycle/dense_source.h"

namespace upmoe {

// Of each token the `per_token` neurons with the largest |silu(g x) (u x)|, the lowest first among equals; x, g and u
// (a neuron's gate and up row) of length 1 each, as CMoE has it. x_TD: what the FFN reads, row-major, T rows. In fp32
// on the CPU, in blocks of rows.
ActiveNeurons active_neurons(const SourceFfn& ffn, DType dtype, const std::vector<float>& x_TD,
                             std::int64_t per_token);

// A layer's experts by experts.method cluster, and with router.method neurons the routers' rows: the gate row of each
// expert's representative, of length 1.
Calibration::Layer clustered_layer(const UpcycleConfig& config, const SourceFfn& ffn, DType dtype,
                                   const std::vector<float>& x_TD);

}  // namespace upmoe
