#include "trainer/optimizer.h"

#include <algorithm>
#include <cmath>

#include "kernels/core/philox.h"
#include "kernels/ops/moment_codes.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"

namespace upmoe {

namespace {

constexpr std::int64_t kSmall = 4096;  // elements of a parameter; below, coding saves nothing
constexpr std::int64_t kAtOnce = std::int64_t{1} << 22;  // of moments that are decoded beside the others

// Every part of the state begins at a multiple of this many elements, so that kernels move it in wide loads.
std::int64_t padded(std::int64_t elements) {
  return checked_add(elements, 63) / 64 * 64;
}

// What a slice takes of the optimizer's memory.
struct Need {
  bool coded;
  std::int64_t floats, codes;  // elements
  Need(const StoredParam& p, bool coding) : coded(coding && p.spec.shape.elements() >= kSmall) {
    const std::int64_t n = p.owned.size();
    const bool master = p.value.dtype != DType::kF32;
    floats = coded ? 2 * padded(moment_blocks(p.owned.begin, n)) : checked_mul(padded(n), master ? 3 : 2);
    codes = coded ? checked_mul(padded(n), 2) : 0;
  }
};

bool is_updated(const StoredParam& p) {
  return p.trains() && p.owned.size() > 0;
}

}  // namespace

Optimizer::Optimizer(const ParamStore& params, Config config, Device device) : config_(config) {
  std::int64_t floats = 0, codes = 0;
  for (const StoredParam& p : params.all()) {
    if (!is_updated(p)) continue;
    const Need need(p, config_.coded);
    floats = checked_add(floats, need.floats);
    codes = checked_add(codes, need.codes);
  }
  const auto allocate = config_.offload ? Buffer::allocate_on_host : Buffer::allocate;
  state_ = allocate(device, static_cast<std::size_t>(checked_mul(floats, 4)), "optimizer state");
  codes_ = allocate(device, static_cast<std::size_t>(codes), "optimizer state, 8 bits");
  TensorView float_memory = state_.view({floats}, DType::kF32),
             code_memory = codes_.view({codes}, DType::kU8);
  for (const StoredParam& p : params.all()) {
    if (!is_updated(p)) continue;
    const Need need(p, config_.coded);
    OwnedSlice s;
    s.coded = need.coded;
    s.param = &p;
    join_group(s);
    bind(s, p, float_memory.rows(0, need.floats), code_memory.rows(0, need.codes));
    float_memory = float_memory.rows(need.floats, float_memory.elements());
    code_memory = code_memory.rows(need.codes, code_memory.elements());
    slices_.push_back(s);
  }
}

void Optimizer::join_group(OwnedSlice& s) const {
  const ParamSpec& spec = s.param->spec;
  std::optional<double> decay;
  for (std::size_t g = 0; g < config_.groups.size(); ++g) {
    const std::vector<std::string>& names = config_.groups[g].names;
    if (std::find(names.begin(), names.end(), spec.name) == names.end()) continue;
    UPMOE_CHECK(s.group == 0, "'{}' is in groups {} and {}", spec.name, s.group - 1, g);
    s.group = g + 1;
    decay = config_.groups[g].weight_decay;
  }
  s.weight_decay = spec.decay ? decay.value_or(config_.weight_decay) : 0.0;
}

void Optimizer::bind(OwnedSlice& s, const StoredParam& p, TensorView floats, TensorView codes) {
  const std::int64_t n = p.owned.size();
  s.weight = p.owned_value();
  s.grad = p.owned_grad;
  if (s.coded) {
    const std::int64_t blocks = moment_blocks(p.owned.begin, n), v = padded(n), v_scale = padded(blocks);
    s.moments = {codes.rows(0, n), codes.rows(v, v + n), floats.rows(0, blocks),
                 floats.rows(v_scale, v_scale + blocks), p.owned.begin};
    s.chance = {philox_key(config_.seed, p.spec.name + " rounding"),
                FlatIndex(p.shard.offset, p.shard.extent, p.spec.shape)};
  } else {
    s.m = floats.rows(0, n);
    const std::int64_t v = padded(n);
    s.v = floats.rows(v, v + n);
    s.master = s.has_master() ? floats.rows(2 * v, 2 * v + n) : s.weight;
  }
}

void Optimizer::reset(Exec& ex) {
  if (state_.bytes() > 0)
    ops::fill(ex, state_.view({static_cast<std::int64_t>(state_.bytes() / 4)}, DType::kF32), 0.0f);
  for (OwnedSlice& s : slices_)
    if (s.has_master()) ops::cast(ex, s.master, s.weight);
}

void Optimizer::begin_moments(const std::map<std::string, std::int64_t>& steps) {
  for (OwnedSlice& s : slices_) {
    const auto step = steps.find(s.param->spec.name);
    s.begun = step == steps.end() ? 0 : step->second;
  }
}

double Optimizer::gradient_norm(Exec& ex, Communicator& world) const {
  ScratchScope scope(*ex.scratch);
  TensorView sum_1 = ex.scratch->take({1}, DType::kF64, "sum of squared gradients");
  double sum = 0;
  ops::upload(ex, sum_1, host_view(&sum, {1}));
  std::vector<ConstTensorView> gradients;
  for (const OwnedSlice& s : slices_) gradients.push_back(s.grad);
  ops::sum_of_squares(ex, sum_1, gradients);
  world.all_reduce(sum_1, ReduceOp::kSum, ex);
  ops::download(ex, host_view(&sum, {1}), sum_1);
  return std::sqrt(sum);
}

void Optimizer::update(Exec& ex, std::span<const double> lr, double norm, std::int64_t step) {
  UPMOE_CHECK(lr.size() == 1 + config_.groups.size(), "{} rates for {} groups", lr.size(),
              config_.groups.size());
  AdamWStep hyper;
  hyper.beta1 = static_cast<float>(config_.beta1);
  hyper.beta2 = static_cast<float>(config_.beta2);
  hyper.eps = static_cast<float>(config_.eps);
  // The same formula as torch's clip_grad_norm_, its 1e-6 too.
  if (config_.clip > 0) hyper.grad_scale = static_cast<float>(std::min(1.0, config_.clip / (norm + 1e-6)));
  for (OwnedSlice& s : slices_) {
    hyper.step = step - s.begun;
    hyper.lr = static_cast<float>(lr[s.group]);
    hyper.weight_decay = static_cast<float>(s.weight_decay);
    if (s.coded) {
      ops::adamw8bit(ex, s.weight, s.moments, s.grad, hyper, s.chance);
    } else {
      ops::adamw(ex, s.weight, s.master, s.m, s.v, s.grad, hyper);
    }
  }
}

std::string Optimizer::first_nonfinite(Exec& ex) const {
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

namespace {

// A part of a slice's moments, which begins and ends with blocks, and room for them as fp32.
struct Part {
  CodedMoments coded;
  std::int64_t begin, end;
  TensorView m_n, v_n;
};

template <class Body>
void for_parts(Exec& ex, const OwnedSlice& s, const Body& body) {
  const CodedMoments& all = s.moments;
  const std::int64_t n = all.m_n.elements(), phase = all.first % kMomentBlock;
  for (std::int64_t begin = 0; begin < n;) {
    // `phase` elements of the first block are another rank's: a part ends where a block does, counted from the shard.
    const std::int64_t end = std::min(n, (begin + phase) / kAtOnce * kAtOnce + kAtOnce - phase);
    const std::int64_t block = (begin + phase) / kMomentBlock,
                       blocks = moment_blocks(all.first + begin, end - begin);
    ScratchScope scope(*ex.scratch);
    const TensorView m_n = ex.scratch->take({end - begin}, DType::kF32, "decoded moments"),
                     v_n = ex.scratch->take({end - begin}, DType::kF32, "decoded moments");
    const CodedMoments coded{all.m_n.rows(begin, end), all.v_n.rows(begin, end),
                             all.m_scale_b.rows(block, block + blocks),
                             all.v_scale_b.rows(block, block + blocks), all.first + begin};
    body(Part{coded, begin, end, m_n, v_n});
    begin = end;
  }
}

}  // namespace

void save_moments(Exec& ex, const OwnedSlice& s, TensorView m, TensorView v) {
  if (!s.coded) {
    ops::download(ex, m, s.m);
    return ops::download(ex, v, s.v);
  }
  for_parts(ex, s, [&](const Part& part) {
    ops::decode_moments(ex, part.m_n, part.v_n, part.coded);
    ops::download(ex, m.rows(part.begin, part.end), part.m_n);
    ops::download(ex, v.rows(part.begin, part.end), part.v_n);
  });
}

void load_moments(Exec& ex, const OwnedSlice& s, ConstTensorView m, ConstTensorView v) {
  if (!s.coded) {
    ops::upload(ex, s.m, m);
    return ops::upload(ex, s.v, v);
  }
  for_parts(ex, s, [&](const Part& part) {
    ops::upload(ex, part.m_n, m.rows(part.begin, part.end));
    ops::upload(ex, part.v_n, v.rows(part.begin, part.end));
    ops::encode_moments(ex, part.coded, part.m_n, part.v_n);
  });
}

}  // namespace upmoe
