#include "trainer/model/param_store.h"

#include <fmt/ranges.h>
#include <fnmatch.h>

#include <algorithm>

#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"
#include "kernels/ops/pointwise.h"

namespace upmoe {

namespace {

constexpr std::int64_t kAlignElements = 64;  // 128 bytes of bf16: whole cache lines

bool continues_previous(
    const std::string& name) {  // k and v follow q without a gap: one matrix for one product
  for (const char* end : {".attn.k_NHD", ".attn.v_NHD", ".attn.k_NH", ".attn.v_NH"})
    if (name.ends_with(end)) return true;
  return false;
}

std::vector<bool> frozen_by(const std::vector<std::string>& patterns, const std::vector<ParamSpec>& table) {
  std::vector<bool> frozen(table.size());
  for (const std::string& pattern : patterns) {
    bool hit = false;
    for (std::size_t i = 0; i < table.size(); ++i)
      if (fnmatch(pattern.c_str(), table[i].name.c_str(), 0) == 0) hit = frozen[i] = true;
    if (!hit)
      fail(ExitCode::kUsage,
           "freeze: pattern '{}' matches no parameter; `upmoe inspect` lists the names, e.g. '{}'", pattern,
           table.front().name);
  }
  return frozen;
}

}  // namespace

ParamStore::ParamStore(const ModelConfig& config, const MeshSpec& mesh, const StagePlan& plan, int rank,
                       const Options& options)
    : options_(options) {
  const std::vector<ParamSpec> table = make_param_table(config);
  const std::vector<bool> frozen = frozen_by(options.freeze, table);
  std::vector<std::int64_t> begin;
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < table.size(); ++i) {
    StoredParam p;
    p.spec = table[i];
    p.shard = shard_of(p.spec, mesh, rank, plan);
    p.replica = replica_of(p.spec, mesh, rank);
    p.owned = owner_slice(p.shard.elements(), p.replica);
    p.frozen = frozen[i];
    if (!continues_previous(p.spec.name))
      elements = (elements + kAlignElements - 1) / kAlignElements * kAlignElements;
    begin.push_back(elements);
    elements = checked_add(elements, p.shard.elements());
    index_[p.spec.name] = params_.size();
    params_.push_back(std::move(p));
  }
  const std::size_t bytes = static_cast<std::size_t>(elements) * size_of(options.dtype);
  values_ = Buffer::allocate(options.device, bytes);
  if (options.gradients) grads_ = Buffer::allocate(options.device, bytes);
  const TensorView values = values_.view({elements}, options.dtype);
  const TensorView grads = options.gradients ? grads_.view({elements}, options.dtype) : TensorView{};
  for (std::size_t i = 0; i < params_.size(); ++i) {
    StoredParam& p = params_[i];
    const std::int64_t end = begin[i] + p.shard.elements();
    p.value = values.rows(begin[i], end).reshape(p.shard.extent);
    if (options.gradients && !p.frozen) p.grad = grads.rows(begin[i], end).reshape(p.shard.extent);
  }
}

const StoredParam& ParamStore::at(const std::string& name) const {
  const auto it = index_.find(name);
  UPMOE_CHECK(it != index_.end(), "no parameter '{}'", name);
  return params_[it->second];
}

Param ParamStore::param(const std::string& name, Shape shape) const {
  const StoredParam& p = at(name);
  return Param{p.value, p.grad}.as(shape);
}

Param ParamStore::joined(const std::vector<std::string>& names, Shape shape) const {
  const StoredParam& first = at(names.front());
  const std::byte* next = first.value.data;
  for (const std::string& name : names) {
    const StoredParam& p = at(name);
    UPMOE_CHECK(p.value.data == next, "'{}' does not follow its neighbour", name);
    if (p.frozen != first.frozen)
      fail(ExitCode::kUsage, "freeze: '{}' and '{}' are one product; freeze all of {} or none", names.front(),
           name, fmt::join(names, ", "));
    if (next != nullptr) next += p.value.bytes();
  }
  Param joined{first.value, first.grad};
  joined.value.shape = shape;
  if (joined.wants_grad()) joined.grad.shape = shape;
  return joined;
}

void ParamStore::load(const ReadParam& read) {
  for (const StoredParam& p : params_)
    if (p.shard.elements() > 0) read(p.spec, p.shard, p.value);
}

void ParamStore::initialise(std::int64_t seed) {
  if (options_.device.type == DeviceType::kDry) return;
  for (const StoredParam& p : params_) initial_values(p.spec, seed, p.shard, p.value);
}

void ParamStore::zero_gradients(Exec& ex) const {
  if (grads_.bytes() == 0) return;
  const auto elements = static_cast<std::int64_t>(grads_.bytes() / size_of(options_.dtype));
  ops::fill(ex, grads_.view({elements}, options_.dtype), 0.0f);
}

namespace {

// `count` initial values from global element `first` on.
void fill_initial(const Init& init, std::uint64_t key, std::int64_t first, std::int64_t count, float* out) {
  switch (init.kind) {
    case Init::Kind::kOnes:
      std::fill_n(out, count, 1.0f);
      return;
    case Init::Kind::kZeros:
      std::fill_n(out, count, 0.0f);
      return;
    case Init::Kind::kNormal:
      normal_batch(key, static_cast<std::uint64_t>(first), count, out);
      for (std::int64_t i = 0; i < count; ++i) out[i] *= init.std;
  }
}

}  // namespace

void initial_values(const ParamSpec& spec, std::int64_t seed, const Box& box, TensorView out) {
  const std::uint64_t key = philox_key(static_cast<std::uint64_t>(seed), spec.name);
  const int rank = spec.shape.rank;
  const std::int64_t width = box.extent[-1], rows = width == 0 ? 0 : box.elements() / width;
#pragma omp parallel
  {
    std::vector<float> row(static_cast<std::size_t>(width));
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < rows; ++r) {
      std::int64_t rest = r, first = 0, stride = spec.shape[-1];
      for (int d = rank - 2; d >= 0; --d) {  // global flat index of this row's first element
        first += (box.offset[d] + rest % box.extent[d]) * stride;
        rest /= box.extent[d];
        stride *= spec.shape[d];
      }
      fill_initial(spec.init, key, first + box.offset[-1], width, row.data());
      for (std::int64_t c = 0; c < width; ++c) {
        const float v = row[static_cast<std::size_t>(c)];
        if (out.dtype == DType::kF32) {
          out.as<float>()[r * width + c] = v;
        } else {
          out.as<bf16>()[r * width + c] = to_bf16(v);
        }
      }
    }
  }
}

}  // namespace upmoe
