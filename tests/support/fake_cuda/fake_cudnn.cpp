#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/core/bf16.h"
#include "tests/support/fake_cuda/cudnn_frontend.h"
#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/fake_cuda/fake_world.h"

struct FakeCudnn {
  cudaStream_t stream = nullptr;
};

namespace {

constexpr std::int64_t kWorkspace = 4096;
std::atomic<int> builds{0}, any_order{0}, executions{0};

using cudnn_frontend::DataType_t;
using cudnn_frontend::graph::Tensor;

// A tensor of four dims in some memory.
struct Strided {
  Tensor t;
  void* data;
  const std::int32_t* offset;  // null: by stride
  std::int64_t at(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) const {
    return (offset != nullptr ? offset[b] : b * t->stride[0]) + h * t->stride[1] + s * t->stride[2] +
           d * t->stride[3];
  }
  double get(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) const {
    const std::int64_t i = at(b, h, s, d);
    return t->type == DataType_t::FLOAT
               ? static_cast<double>(static_cast<const float*>(data)[i])
               : static_cast<double>(upmoe::to_float(static_cast<const upmoe::bf16*>(data)[i]));
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d, double x) const {
    const std::int64_t i = at(b, h, s, d);
    if (t->type == DataType_t::FLOAT)
      static_cast<float*>(data)[i] = static_cast<float>(x);
    else
      static_cast<upmoe::bf16*>(data)[i] = upmoe::to_bf16(static_cast<float>(x));
  }
};

struct Attention {
  Strided q, k, v, o, stats, d_o, dq, dk, dv;
  double scale;
  std::int64_t batch, heads, kv_heads, length, width, left_bound;
  const std::int32_t* size;  // null: all are whole

  std::int64_t rows(std::int64_t b) const { return size != nullptr ? size[b] : length; }

  std::int64_t first_key(std::int64_t row) const {
    return left_bound == 0 ? 0 : std::max<std::int64_t>(0, row - left_bound + 1);
  }

  double dot(const Strided& a, std::int64_t b, std::int64_t ha, std::int64_t i, const Strided& c,
             std::int64_t hc, std::int64_t j) const {
    double sum = 0;
    for (std::int64_t d = 0; d < width; ++d) sum += a.get(b, ha, i, d) * c.get(b, hc, j, d);
    return sum;
  }

  void forward_row(std::int64_t b, std::int64_t h, std::int64_t i) const {
    const std::int64_t hk = h / (heads / kv_heads);
    std::vector<double> score(static_cast<std::size_t>(i + 1)), out(static_cast<std::size_t>(width));
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (std::int64_t j = first_key(i); j <= i; ++j)
      most = std::max(most, score[static_cast<std::size_t>(j)] = scale * dot(q, b, h, i, k, hk, j));
    for (std::int64_t j = first_key(i); j <= i; ++j) {
      const double p = std::exp(score[static_cast<std::size_t>(j)] - most);
      sum += p;
      for (std::int64_t d = 0; d < width; ++d) out[static_cast<std::size_t>(d)] += p * v.get(b, hk, j, d);
    }
    for (std::int64_t d = 0; d < width; ++d) o.set(b, h, i, d, out[static_cast<std::size_t>(d)] / sum);
    stats.set(b, h, i, 0, most + std::log(sum));
  }

  // All heads of one key head, so that their sums are whole before they are rounded.
  void backward_group(std::int64_t b, std::int64_t hk) const {
    const std::int64_t rows_here = rows(b);
    const auto elements = static_cast<std::size_t>(rows_here * width);
    std::vector<double> key(elements), value(elements);
    for (std::int64_t h = hk * (heads / kv_heads); h < (hk + 1) * (heads / kv_heads); ++h)
      for (std::int64_t i = 0; i < rows_here; ++i) {
        const double delta = dot(d_o, b, h, i, o, h, i);
        std::vector<double> query(static_cast<std::size_t>(width));
        for (std::int64_t j = first_key(i); j <= i; ++j) {
          const double p = std::exp(scale * dot(q, b, h, i, k, hk, j) - stats.get(b, h, i, 0));
          const double ds = scale * p * (dot(d_o, b, h, i, v, hk, j) - delta);
          for (std::int64_t d = 0; d < width; ++d) {
            const auto jd = static_cast<std::size_t>(j * width + d);
            query[static_cast<std::size_t>(d)] += ds * k.get(b, hk, j, d);
            key[jd] += ds * q.get(b, h, i, d);
            value[jd] += p * d_o.get(b, h, i, d);
          }
        }
        for (std::int64_t d = 0; d < width; ++d) dq.set(b, h, i, d, query[static_cast<std::size_t>(d)]);
      }
    for (std::int64_t j = 0; j < rows_here; ++j)
      for (std::int64_t d = 0; d < width; ++d) {
        dk.set(b, hk, j, d, key[static_cast<std::size_t>(j * width + d)]);
        dv.set(b, hk, j, d, value[static_cast<std::size_t>(j * width + d)]);
      }
  }
};

}  // namespace

namespace fake_cuda {
int cudnn_builds() {
  return builds;
}
int cudnn_any_order_builds() {
  return any_order;
}
int cudnn_executions() {
  return executions;
}
}  // namespace fake_cuda

std::size_t cudnnGetVersion() {
  return 91300;
}
const char* cudnnGetErrorString(cudnnStatus_t status) {
  return status == CUDNN_STATUS_SUCCESS ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_NOT_INITIALIZED";
}
cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  *handle = new FakeCudnn;
  return static_cast<cudnnStatus_t>(fake_cuda::planted("cudnnCreate"));
}
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
  delete handle;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  handle->stream = stream;
  return CUDNN_STATUS_SUCCESS;
}

namespace cudnn_frontend::graph {

template <class Options>
void Graph::take(const Options& options) {
  left_bound_ = options.left_bound;
  scale_ = options.scale;
  padded_ = options.padded;
  size_q_ = options.size_q;
  size_kv_ = options.size_kv;
}

std::array<Tensor, 2> Graph::sdpa(Tensor q, Tensor k, Tensor v, SDPA_attributes options) {
  causal_ = options.causal && options.stats;
  take(options);
  const auto out = std::make_shared<Tensor_attributes>(), stats = std::make_shared<Tensor_attributes>();
  stats->dim = {q->dim[0], q->dim[1], q->dim[2], 1};
  stats->stride = {q->dim[1] * q->dim[2], q->dim[2], 1, 1};
  tensors_ = {{"q", q}, {"k", k}, {"v", v}, {"o", out}, {"stats", stats}};
  return {out, stats};
}

std::array<Tensor, 3> Graph::sdpa_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor d_o, Tensor stats,
                                           SDPA_backward_attributes options) {
  backward_ = true;
  causal_ = options.causal;
  deterministic_ = options.deterministic;
  take(options);
  const auto make = [] { return std::make_shared<Tensor_attributes>(); };
  const Tensor dq = make(), dk = make(), dv = make();
  tensors_ = {{"q", q},         {"k", k},   {"v", v},   {"o", o},  {"d_o", d_o},
              {"stats", stats}, {"dq", dq}, {"dk", dk}, {"dv", dv}};
  return {dq, dk, dv};
}

// What the library itself demands, of what attention here relies on.
error_t Graph::validate() {
  if (!causal_) return {false, "not what is wanted"};
  const auto& q = tensors_["q"]->dim;
  if (left_bound_ < 0 || left_bound_ >= q[2])
    return {false, "a left bound of " + std::to_string(left_bound_)};
  if (q[3] % 8 != 0 || q[3] > 128) return {false, "head dim"};
  for (const auto& [name, t] : tensors_) {
    if (t->dim.size() != 4 || t->stride.size() != 4 || t->stride[3] != 1 || t->uid == 0)
      return {false, name + ": dims, strides or uid"};
    if (t->dim[0] != q[0] || t->dim[2] != q[2] || q[1] % t->dim[1] != 0) return {false, name + ": dims"};
    if ((t->type == DataType_t::FLOAT) != (name == "stats")) return {false, name + ": type"};
  }
  if (const error_t sizes = validate_sizes(); !sizes.is_good()) return sizes;
  const Tensor& stats = tensors_["stats"];
  if (stats->stride[1] != q[2] || stats->stride[0] != q[1] * q[2] || stats->stride[2] != 1)
    return {false, "stats are packed"};
  return {};
}

// Ragged tensors are all of them but the stats, and then sequences have sizes.
error_t Graph::validate_sizes() {
  const std::int64_t batch = tensors_["q"]->dim[0];
  const auto counts = [](const Tensor& t, std::int64_t n) {
    return t != nullptr && t->type == DataType_t::INT32 && t->uid != 0 &&
           t->dim == std::vector<std::int64_t>{n, 1, 1, 1} &&
           t->stride == std::vector<std::int64_t>{1, 1, 1, 1};
  };
  const bool ragged = tensors_["q"]->offset != nullptr;
  if (ragged != padded_) return {false, "a padding mask with ragged tensors, and with them alone"};
  if (padded_ != (size_q_ != nullptr && size_kv_ != nullptr)) return {false, "sizes and no padding mask"};
  if (!ragged) return {};
  if (!counts(size_q_, batch) || !counts(size_kv_, batch)) return {false, "sizes of sequences"};
  for (const auto& [name, t] : tensors_) {
    if ((t->offset != nullptr) != (name != "stats")) return {false, name + ": ragged or not"};
    if (t->offset != nullptr && !counts(t->offset, batch + 1)) return {false, name + ": offsets"};
  }
  return {};
}

error_t Graph::build(cudnnHandle_t, const std::vector<HeurMode_t>& modes) {
  ++builds;
  if (fake_cuda::planted("cudnn graph") != cudaSuccess) return {false, "no engine supports this graph"};
  if (modes.empty()) return {false, "no heuristics"};
  if (backward_ && !deterministic_) ++any_order;
  const error_t valid = validate();
  built_ = valid.is_good();
  return valid;
}

error_t Graph::get_workspace_size(std::int64_t& bytes) {
  // As Hopper's algorithm: a part of each query's gradient for each block of keys.
  const auto& q = tensors_["q"]->dim;
  bytes = kWorkspace + (backward_ && deterministic_ ? q[0] * q[1] * q[2] * q[2] * 2 : 0);
  workspace_ = bytes;
  return {};
}

error_t Graph::execute(cudnnHandle_t handle, std::unordered_map<std::int64_t, void*>& memory,
                       void* workspace) {
  if (!built_) return {false, "not built"};
  if (fake_cuda::planted("cudnn execute") != cudaSuccess) return {false, "CUDNN_STATUS_EXECUTION_FAILED"};
  if (workspace == nullptr || reinterpret_cast<std::uintptr_t>(workspace) % 256 != 0)
    return {false, "workspace"};
  ++executions;
  Attention a{};
  const std::map<std::string, Strided*> parts{{"q", &a.q},   {"k", &a.k},     {"v", &a.v},
                                              {"o", &a.o},   {"d_o", &a.d_o}, {"stats", &a.stats},
                                              {"dq", &a.dq}, {"dk", &a.dk},   {"dv", &a.dv}};
  const auto workspace_bytes = static_cast<std::size_t>(workspace_);
  fake_cuda::Ranges reads, writes{{workspace, workspace_bytes}};
  for (const auto& [name, t] : tensors_) {
    const auto it = memory.find(t->uid);
    if (it == memory.end() || it->second == nullptr) return {false, "no memory for " + name};
    const std::int32_t* offset = nullptr;
    if (t->offset != nullptr) {
      const auto offsets = memory.find(t->offset->uid);
      if (offsets == memory.end() || offsets->second == nullptr) return {false, "no offsets for " + name};
      offset = static_cast<const std::int32_t*>(offsets->second);
      reads.push_back({offset, static_cast<std::size_t>(t->offset->dim[0]) * 4});
    }
    *parts.at(name) = {t, it->second, offset};
    std::int64_t last = 0;
    for (std::size_t i = 0; i < 4; ++i) last += (t->dim[i] - 1) * t->stride[i];
    if (offset != nullptr) last = 0;  // where it lies is known when it is computed
    const auto bytes = static_cast<std::size_t>(last + 1) * (t->type == DataType_t::FLOAT ? 4 : 2);
    const bool written =
        backward_ ? name == "dq" || name == "dk" || name == "dv" : name == "o" || name == "stats";
    (written ? writes : reads).push_back({it->second, bytes});
  }
  fake_cuda::touched(handle->stream, "attention", reads, writes);
  const auto& q = a.q.t->dim;
  a.scale = static_cast<double>(scale_);
  a.batch = q[0];
  a.heads = q[1];
  a.kv_heads = a.k.t->dim[1];
  a.length = q[2];
  a.left_bound = left_bound_;
  a.width = q[3];
  if (padded_) {
    const auto q_sizes = memory.find(size_q_->uid), kv_sizes = memory.find(size_kv_->uid);
    if (q_sizes == memory.end() || kv_sizes == memory.end() || q_sizes->second != kv_sizes->second)
      return {false, "sizes of queries and of keys"};
    a.size = static_cast<const std::int32_t*>(q_sizes->second);
  }
  fake_cuda::enqueue(handle->stream, [a, workspace, workspace_bytes, backward = backward_] {
    std::memset(workspace, 0xff, workspace_bytes);
    for (std::int64_t b = 0; b < a.batch; ++b) {
      if (backward) {
        for (std::int64_t h = 0; h < a.kv_heads; ++h) a.backward_group(b, h);
      } else {
        for (std::int64_t h = 0; h < a.heads; ++h)
          for (std::int64_t i = 0; i < a.rows(b); ++i) a.forward_row(b, h, i);
      }
    }
  });
  return {};
}

}  // namespace cudnn_frontend::graph
