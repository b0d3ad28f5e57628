#include "trainer/router_buffers.h"

#include <numeric>

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

std::vector<float> values_of(Exec& ex, ConstTensorView buffer_E) {
  std::vector<float> values(static_cast<std::size_t>(buffer_E.elements()));
  ops::download(ex, host_view(values.data(), buffer_E.shape), buffer_E);
  return values;
}

double sum_of(const std::vector<double>& counts_E) {
  return std::accumulate(counts_E.begin(), counts_E.end(), 0.0);
}

}  // namespace

void update_router_biases(Exec& ex, const ParamStore& params, const ModelConfig& config,
                          const std::vector<std::vector<double>>& assigned, double rate) {
  if (rate == 0) return;
  for_each_buffer(params, config, Role::kRouterBias,
                  [&](std::size_t, std::size_t mixture, TensorView bias_E) {
                    const std::vector<double>& counts_E = assigned[mixture];
                    std::vector<float> bias = values_of(ex, bias_E);
                    // Both sides times E, so that they are whole numbers.
                    const double total = sum_of(counts_E), experts = static_cast<double>(counts_E.size());
                    for (std::size_t e = 0; e < bias.size(); ++e) {
                      const double lacks = total - experts * counts_E[e];
                      bias[e] += static_cast<float>(lacks > 0 ? rate : lacks < 0 ? -rate : 0.0);
                    }
                    ops::upload(ex, bias_E, host_view(static_cast<const float*>(bias.data()), bias_E.shape));
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

std::vector<std::vector<double>> router_loads(Exec& ex, const ParamStore& params, const ModelConfig& config) {
  std::vector<std::vector<double>> all(static_cast<std::size_t>(config.num_hidden_layers));
  for_each_buffer(params, config, Role::kRouterLoad, [&](std::size_t block, std::size_t, TensorView load_E) {
    const std::vector<float> load = values_of(ex, load_E);
    all[block].assign(load.begin(), load.end());
  });
  return all;
}

}  // namespace upmoe
