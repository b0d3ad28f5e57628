#include "data/hf_names.h"

#include <algorithm>
#include <map>
#include <span>
#include <string_view>
#include <utility>

namespace upmoe {

namespace {

bool of_experts(const TensorName& name) {
  return name.role == Role::kExpertGateUp || name.role == Role::kExpertDown;
}

// Of the dims on disk, those of heads and of their size are one; the size alone, of what all heads share, is itself.
HfTensor tensor_of(const TensorName& name, const ParamSpec& p, std::int64_t expert) {
  HfTensor tensor;
  tensor.name = name.of(p.layer, expert);
  tensor.half = name.half;
  tensor.expert = of_experts(name) ? expert : -1;
  tensor.transposed = name.transposed;
  tensor.fp32 = p.fp32;
  tensor.part = whole(p.shape);
  for (int d = 0; d < p.shape.rank; ++d) {
    const auto i = static_cast<std::size_t>(d);
    const bool one_expert = p.dims[i] == Dim::kExpert,
               one_half = p.dims[i] == Dim::kPair && name.half != Half::kWhole;
    if (one_expert || one_half) {
      tensor.part.offset.dim[i] = one_expert ? expert : name.half == Half::kUp ? 1 : 0;
      tensor.part.extent.dim[i] = 1;
    } else if (p.dims[i] == Dim::kHeadSize && !tensor.shape.empty()) {
      tensor.shape.back() = checked_mul(tensor.shape.back(), p.shape[d]);
    } else {
      tensor.shape.push_back(p.shape[d]);
    }
  }
  if (name.transposed) std::swap(tensor.shape[0], tensor.shape[1]);
  if (of_experts(name) && !name.by_expert()) {  // all of them, one behind the other
    tensor.begin = expert * tensor.elements();
    tensor.shape[0] = checked_mul(tensor.shape[0], p.shape[0]);
  }
  return tensor;
}

// Rows of other parameters in the same tensor, before and behind it.
void join(const ModelConfig& config, const TensorName& name, int layer, HfTensor& tensor) {
  bool before = true;
  for (const TensorName& other : family_of(config).tensors) {
    if (other.role == name.role && other.half == name.half) {
      before = false;
    } else if (std::string_view(other.name) == name.name) {
      const HfTensor beside = tensor_of(other, make_param(config, other.role, layer), -1);
      if (before) tensor.begin += beside.elements();
      tensor.shape[0] += beside.shape[0];
    }
  }
}

// visit(name, expert) in the order on disk: neighbours by expert come expert by expert (gate 0, up 0, down 0, gate 1).
template <class Visit>
void for_each_tensor(std::span<const TensorName> names, std::int64_t experts, const Visit& visit) {
  for (auto begin = names.begin(); begin != names.end();) {
    const bool by_expert = begin->by_expert();
    const auto end =
        by_expert ? std::find_if_not(begin, names.end(), std::mem_fn(&TensorName::by_expert)) : begin + 1;
    for (std::int64_t e = 0; e < (of_experts(*begin) ? experts : 1); ++e)
      for (auto at = begin; at != end; ++at) visit(*at, e);
    begin = end;
  }
}

// All tensors of a model.
class Listing {
 public:
  explicit Listing(const ModelConfig& config) : config_(config), family_(family_of(config)) {
    for (ParamSpec& p : make_param_table(config)) params_.emplace(std::pair(p.layer, p.role), std::move(p));
  }
  std::vector<HfTensor> make() {
    const auto names = family_.tensors;
    const auto by_block = std::mem_fn(&TensorName::by_block);
    const auto first = std::find_if(names.begin(), names.end(), by_block),
               last = std::find_if_not(first, names.end(), by_block);
    add({names.begin(), first}, kOutsideBlocks);
    for (int layer = 0; layer < config_.num_hidden_layers; ++layer) add({first, last}, layer);
    add({last, names.end()}, kOutsideBlocks);
    return std::move(all_);
  }

 private:
  void add(std::span<const TensorName> names, int layer) {
    const std::int64_t experts = layer >= 0 && config_.is_moe_layer(layer) ? config_.num_experts : 0;
    for_each_tensor(names, experts, [&](const TensorName& name, std::int64_t expert) {
      if (const auto it = params_.find({layer, name.role}); it != params_.end()) {
        all_.push_back(tensor_of(name, it->second, expert));
        join(config_, name, layer, all_.back());
      } else if (experts > 0 && is_empty(name.role)) {
        all_.push_back(tensor_of(name, make_param(config_, name.role, layer), expert));
        all_.back().part = {};
        all_.back().zeros = true;
      }
    });
  }
  bool is_empty(Role role) const {
    return family_.empty_shared_expert && config_.shared_expert_intermediate_size == 0 &&
           (role == Role::kSharedGateUp || role == Role::kSharedDown || role == Role::kSharedGate);
  }

  const ModelConfig& config_;
  const Family& family_;
  std::map<std::pair<int, Role>, ParamSpec> params_;
  std::vector<HfTensor> all_;
};

}  // namespace

std::int64_t HfTensor::elements() const {
  std::int64_t n = 1;
  for (const std::int64_t d : shape) n = checked_mul(n, d);
  return n;
}

std::vector<HfTensor> hf_tensors_of(const ModelConfig& config, const ParamSpec& p) {
  std::vector<TensorName> names;
  for (const TensorName& name : family_of(config).tensors)
    if (name.role == p.role) names.push_back(name);
  UPMOE_CHECK(!names.empty() || p.added, "{} has no tensor for '{}'", config.model_type, p.name);
  std::vector<HfTensor> tensors;
  for_each_tensor(names, p.shape[0], [&](const TensorName& name, std::int64_t expert) {
    tensors.push_back(tensor_of(name, p, expert));
    join(config, name, p.layer, tensors.back());
  });
  return tensors;
}

std::vector<HfTensor> hf_tensors_of(const ModelConfig& config) {
  return Listing(config).make();
}

}  // namespace upmoe
