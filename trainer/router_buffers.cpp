#include "trainer/router_buffers.h"

#include <numeric>
#include <utility>

#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

namespace {

// visit(block, mixture, buffer) for the buffers of this role that lie here.
template <class Visit>
void for_each_buffer(const ParamStore& params, const ModelConfig& config, Role role, const Visit& visit) {
  std::size_t mixture = 0;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (!config.is_moe_layer(layer)) continue;
    const std::string name = param_name(role, layer);
    if (params.has(name)) visit(static_cast<std::size_t>(layer), mixture, params.at(name).value);
    ++mixture;
  }
}

double sum_of(const std::vector<double>& counts_E) {
  return std::accumulate(counts_E.begin(), counts_E.end(), 0.0);
}

}  // namespace

void update_router_biases(Exec& ex, const ParamStore& params, const ModelConfig& config,
                          const std::vector<std::vector<double>>& assigned, double rate) {
  if (rate == 0) return;
  for_each_buffer(
      params, config, Role::kRouterBias, [&](std::size_t, std::size_t mixture, TensorView bias_E) {
        const std::vector<double>& counts_E = assigned[mixture];
        std::vector<float> change;
        // Both sides times E, so that they are whole numbers.
        const double total = sum_of(counts_E), experts = static_cast<double>(counts_E.size());
        for (const double count : counts_E) {
          const double lacks = total - experts * count;
          change.push_back(static_cast<float>(lacks > 0 ? rate : lacks < 0 ? -rate : 0.0));
        }
        // The bias itself stays on the device: the host waits for nothing.
        ScratchScope scope(*ex.scratch);
        const TensorView change_E = ex.scratch->take(bias_E.shape, bias_E.dtype, "change of a router's bias");
        ops::upload(ex, change_E, host_view(std::as_const(change).data(), bias_E.shape));
        ops::add(ex, bias_E, bias_E, change_E);
      });
}

void update_router_loads(Exec& ex, const ParamStore& params, const ModelConfig& config,
                         const std::vector<std::vector<double>>& assigned) {
  for_each_buffer(params, config, Role::kRouterLoad,
                  [&](std::size_t, std::size_t mixture, TensorView load_E) {
                    const double total = sum_of(assigned[mixture]);
                    std::vector<float> load;
                    for (const double count : assigned[mixture])
                      load.push_back(static_cast<float>(count / total));
                    ops::upload(ex, load_E, host_view(static_cast<const float*>(load.data()), load_E.shape));
                  });
}

std::vector<ConstTensorView> router_loads(const ParamStore& params, const ModelConfig& config) {
  std::vector<ConstTensorView> all(static_cast<std::size_t>(config.num_hidden_layers));
  for_each_buffer(params, config, Role::kRouterLoad,
                  [&](std::size_t block, std::size_t, TensorView load_E) { all[block] = load_E; });
  return all;
}

}  // namespace upmoe
