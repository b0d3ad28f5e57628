#include "trainer/optimizer.h"

#include <algorithm>
#include <cmath>

#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

Optimizer::Optimizer(const ParamStore& params, Config config, Device device)
    : config_(config), masters_(params.dtype() != DType::kF32) {
  std::int64_t elements = 0;
  for (const StoredParam& p : params.all())
    if (!p.frozen) elements = checked_add(elements, p.owned.size());
  const std::int64_t kinds = masters_ ? 3 : 2;
  state_ = Buffer::allocate(device, static_cast<std::size_t>(checked_mul(elements, kinds)) * sizeof(float),
                            "optimizer state");
  const TensorView all = state_.view({elements * kinds}, DType::kF32);
  std::int64_t at = 0;
  for (const StoredParam& p : params.all()) {
    if (p.frozen || p.owned.size() == 0) continue;
    const std::int64_t n = p.owned.size();
    OwnedSlice s;
    s.param = &p;
    s.weight = p.value.reshape({p.value.elements()}).rows(p.owned.begin, p.owned.end);
    s.grad = p.owned_grad;
    s.m = all.rows(at, at + n);
    s.v = all.rows(elements + at, elements + at + n);
    s.master = masters_ ? all.rows(2 * elements + at, 2 * elements + at + n) : s.weight;
    at += n;
    slices_.push_back(s);
  }
}

void Optimizer::reset(Exec& ex) {
  for (OwnedSlice& s : slices_) {
    ops::fill(ex, s.m, 0.0f);
    ops::fill(ex, s.v, 0.0f);
    if (masters_) ops::cast(ex, s.master, s.weight);
  }
}

double Optimizer::gradient_norm(Exec& ex, Communicator& world) const {
  ScratchScope scope(*ex.scratch);
  TensorView sum_1 = ex.scratch->take({1}, DType::kF64, "sum of squared gradients");
  double sum = 0;
  ops::upload(ex, sum_1, host_view(&sum, {1}));
  for (const OwnedSlice& s : slices_) ops::sum_of_squares(ex, sum_1, s.grad);
  world.all_reduce(sum_1, ReduceOp::kSum, ex.stream);
  ops::download(ex, host_view(&sum, {1}), sum_1);
  return std::sqrt(sum);
}

void Optimizer::update(Exec& ex, double lr, double norm, std::int64_t step) {
  AdamWStep hyper;
  hyper.lr = static_cast<float>(lr);
  hyper.beta1 = static_cast<float>(config_.beta1);
  hyper.beta2 = static_cast<float>(config_.beta2);
  hyper.eps = static_cast<float>(config_.eps);
  hyper.step = step;
  if (config_.clip > 0) hyper.grad_scale = static_cast<float>(std::min(1.0, config_.clip / (norm + 1e-6)));
  for (OwnedSlice& s : slices_) {
    hyper.weight_decay = s.param->spec.decay ? static_cast<float>(config_.weight_decay) : 0.0f;
    ops::adamw(ex, s.weight, s.master, s.m, s.v, s.grad, hyper);
  }
}

std::string Optimizer::first_nonfinite(Exec& ex) const {
  constexpr std::int64_t kAtOnce = 1 << 20;
  const Buffer memory = Buffer::allocate({}, kAtOnce * sizeof(float));
  for (const OwnedSlice& s : slices_)
    for (std::int64_t begin = 0; begin < s.grad.elements(); begin += kAtOnce) {
      const TensorView part = s.grad.rows(begin, std::min(s.grad.elements(), begin + kAtOnce));
      const TensorView host = memory.view(part.shape, part.dtype);
      ops::download(ex, host, part);
      for (std::int64_t i = 0; i < host.elements(); ++i) {
        const float g = host.dtype == DType::kF32 ? host.as<float>()[i] : to_float(host.as<bf16>()[i]);
        if (!std::isfinite(g)) return s.param->spec.name;
      }
    }
  return {};
}

}  // namespace upmoe
