#include "trainer/model/param_store.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "kernels/core/flat_index.h"
#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"
#include "parallel/stage_plan.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace {

constexpr std::int64_t kAlignElements = 64;  // 128 bytes of bf16: whole cache lines

std::int64_t rounded_up(std::int64_t n, std::int64_t to) {
  return checked_add(n, to - 1) / to * to;
}

// Where tensors begin in a flat buffer, in bytes: in one there may be several dtypes.
struct Offsets {
  std::int64_t end = 0;
  std::int64_t take(std::int64_t elements, DType dtype, std::int64_t align_elements) {
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    const std::int64_t begin = rounded_up(end, align_elements * size);
    end = checked_add(begin, checked_mul(elements, size));
    return begin;
  }
  std::int64_t take(const StoredParam& p, DType dtype) {
    return take(p.shard.elements(), dtype, p.spec.joins_previous ? 1 : kAlignElements);
  }
};

// Flat, `elements` long, from byte `begin` of the buffer on.
TensorView part_of(const Buffer& buffer, std::int64_t begin, std::int64_t elements, DType dtype) {
  const auto bytes = static_cast<std::int64_t>(size_of(dtype)) * elements;
  TensorView part =
      buffer.view({static_cast<std::int64_t>(buffer.bytes())}, DType::kU8).rows(begin, begin + bytes);
  part.shape = {elements};
  part.dtype = dtype;
  return part;
}

// Of whole floats.
Buffer allocate(Device device, std::int64_t bytes, const char* what) {
  return Buffer::allocate(device, static_cast<std::size_t>(rounded_up(bytes, sizeof(float))), what);
}

bool holds(const std::vector<Role>& roles, Role role) {
  return std::find(roles.begin(), roles.end(), role) != roles.end();
}

}  // namespace

ParamStore::ParamStore(const ModelConfig& config, const MeshSpec& mesh, const StagePlan& plan, int rank,
                       const Options& options)
    : options_(options) {
  UPMOE_CHECK(options.grad_dtype == options.dtype || options.grad_dtype == DType::kF32,
              "gradients in {} beside values in {}", name_of(options.grad_dtype), name_of(options.dtype));
  const std::vector<ParamSpec> table = make_param_table(config);
  std::size_t frozen = 0;
  for (std::size_t i = 0; i < table.size(); ++i) {
    StoredParam p;
    p.spec = table[i];
    p.spec.fp32 |= holds(options.fp32, p.spec.role);
    UPMOE_CHECK(!p.spec.joins_previous || p.spec.fp32 == params_.back().spec.fp32,
                "'{}' and its neighbour are one product of two dtypes", p.spec.name);
    p.shard = shard_of(p.spec, mesh, rank, plan);
    p.replica = replica_of(p.spec, mesh, rank);
    p.owned = owner_slice(p.shard.elements(), p.replica);
    p.frozen = std::find(options.freeze.begin(), options.freeze.end(), p.spec.name) != options.freeze.end();
    frozen += p.frozen ? 1 : 0;
    index_[p.spec.name] = params_.size();
    params_.push_back(std::move(p));
  }
  UPMOE_CHECK(frozen == options.freeze.size(), "{} names to freeze, {} parameters of these names",
              options.freeze.size(), frozen);
  bind_values();
  bind_marks();
  if (!options.gradients) return;
  choose_sharing();
  bind_gradients();
}

void ParamStore::bind_values() {
  Offsets offsets;
  std::vector<std::int64_t> begin;
  for (const StoredParam& p : params_) begin.push_back(offsets.take(p, value_dtype(p.spec)));
  values_ = allocate(options_.device, offsets.end, "parameters");
  for (std::size_t i = 0; i < params_.size(); ++i) {
    StoredParam& p = params_[i];
    p.value = part_of(values_, begin[i], p.shard.elements(), value_dtype(p.spec)).reshape(p.shard.extent);
  }
}

void ParamStore::bind_marks() {
  written_ = std::make_unique<bool[]>(2 * params_.size());
  for (std::size_t i = 0; i < params_.size(); ++i) {
    params_[i].grad_written = &written_[i];
    params_[i].owned_grad_written = &written_[params_.size() + i];
  }
}

// A gradient that no other rank adds to stays where it is between micro-batches; only what is reduced away
// can make room. Neighbours that are one product (q, k, v) lie together, so they decide together.
void ParamStore::choose_sharing() {
  if (!options_.share_block_grads) return;
  for (std::size_t begin = 0, end = 0; begin < params_.size(); begin = end) {
    bool reduced = false;
    do {
      reduced |= params_[end].replica.count > 1;
      ++end;
    } while (end < params_.size() && params_[end].spec.joins_previous);
    for (std::size_t i = begin; i < end; ++i)
      params_[i].shares_grad = reduced && params_[i].spec.layer >= 0 && params_[i].trains();
  }
}

// Where gradients lie with shared blocks (ZeRO-2), and without (the first part is empty then):
//
//   grads_         | the blocks' reduced gradients, all in one place | everything else, one behind the other |
//                    as large as the largest block's
//   owned_grads_   | of each shared gradient this rank's slice, summed over micro-batches and ranks           |
void ParamStore::bind_gradients() {
  std::map<int, Offsets> blocks;  // each begins anew, in the memory that all of them share
  Offsets rest, owned;
  std::vector<std::int64_t> begin(params_.size()), begin_owned(params_.size());
  for (std::size_t i = 0; i < params_.size(); ++i) {
    const StoredParam& p = params_[i];
    if (!p.shares_grad) continue;
    begin[i] = blocks[p.spec.layer].take(p, grad_dtype(p.spec));
    begin_owned[i] = owned.take(p.owned.size(), grad_dtype(p.spec), 1);
  }
  for (const auto& [layer, offsets] : blocks)
    rest.end = std::max(rest.end, rounded_up(offsets.end, sizeof(float)));
  for (std::size_t i = 0; i < params_.size(); ++i)
    if (params_[i].trains() && !params_[i].shares_grad)
      begin[i] = rest.take(params_[i], grad_dtype(params_[i].spec));
  grads_ = allocate(options_.device, rest.end, "gradients");
  owned_grads_ = allocate(options_.device, owned.end, "gradients, reduced");

  for (std::size_t i = 0; i < params_.size(); ++i) {
    StoredParam& p = params_[i];
    if (!p.trains()) continue;
    const DType dtype = grad_dtype(p.spec);
    const TensorView flat = part_of(grads_, begin[i], p.shard.elements(), dtype);
    p.grad = flat.reshape(p.shard.extent);
    p.owned_grad = p.shares_grad ? part_of(owned_grads_, begin_owned[i], p.owned.size(), dtype)
                                 : flat.rows(p.owned.begin, p.owned.end);
  }
}

const StoredParam& ParamStore::at(const std::string& name) const {
  const auto it = index_.find(name);
  UPMOE_CHECK(it != index_.end(), "no parameter '{}'", name);
  return params_[it->second];
}

Param ParamStore::param(const std::string& name, Shape shape) const {
  const StoredParam& p = at(name);
  return p.whole().as(shape);
}

Param ParamStore::joined(const std::vector<std::string>& names, Shape shape) const {
  const StoredParam& first = at(names.front());
  const std::byte* next = first.value.data;
  const bool* mark = first.grad_written;
  for (const std::string& name : names) {
    const StoredParam& p = at(name);
    UPMOE_CHECK(p.value.data == next && p.grad_written == mark, "'{}' does not follow its neighbour", name);
    ++mark;
    if (p.frozen != first.frozen)
      fail(ExitCode::kUsage, "freeze: '{}' and '{}' are one product; freeze all of {} or none", names.front(),
           name, fmt::join(names, ", "));
    if (next != nullptr) next += p.value.bytes();
  }
  Param joined{first.value, first.grad, {first.grad_written, names.size()}};
  joined.value.shape = shape;
  if (joined.wants_grad()) joined.grad.shape = shape;
  return joined;
}

void ParamStore::load(Exec& ex, const ReadParam& read) {
  for (const StoredParam& p : params_) {
    watchdog::heartbeat();
    if (p.shard.elements() > 0)
      ops::write_through_host(ex, p.value, [&](TensorView out) { read(p.spec, p.shard, out); });
  }
}

void ParamStore::initialise(Exec& ex, std::int64_t seed) {
  for (const StoredParam& p : params_) {
    watchdog::heartbeat();
    ops::write_through_host(ex, p.value, [&](TensorView out) { initial_values(p.spec, seed, p.shard, out); });
  }
}

void ParamStore::forget_gradients() const {
  std::fill_n(written_.get(), 2 * params_.size(), false);
}

void ParamStore::zero_unwritten_gradients(Exec& ex, int layer) const {
  for (const StoredParam& p : params_) {
    if (p.spec.layer != layer || !p.grad.given() || *p.grad_written) continue;
    if (p.grad.elements() > 0) ops::fill(ex, p.grad, 0.0f);
    *p.grad_written = true;
  }
}

void ParamStore::forget_shared_gradients(int layer) const {
  for (const StoredParam& p : params_)
    if (p.spec.layer == layer && p.shares_grad) *p.grad_written = false;
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
      for (std::int64_t i = 0; i < count; ++i) out[i] *= init.size;
      return;
    case Init::Kind::kUniform:
      for (std::int64_t i = 0; i < count; ++i) {
        const float u = uniform_from_bits(philox(key, static_cast<std::uint64_t>(first + i))[0]);
        out[i] = (2.0f * u - 1.0f) * init.size;
      }
  }
}

}  // namespace

void initial_values(const ParamSpec& spec, std::int64_t seed, const Box& box, TensorView out) {
  const std::uint64_t key = philox_key(static_cast<std::uint64_t>(seed), spec.name);
  // Values are numbered in the whole tensor: a parameter begins the same under every layout.
  const FlatIndex number(box.offset, box.extent, spec.shape);
  const std::int64_t width = box.extent[-1], rows = width == 0 ? 0 : box.elements() / width;
#pragma omp parallel
  {
    std::vector<float> row(static_cast<std::size_t>(width));
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < rows; ++r) {
      fill_initial(spec.init, key, number.at(r * width), width, row.data());
      store_floats(row, out, r * width);
    }
  }
}

}  // namespace upmoe
