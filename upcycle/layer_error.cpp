#include "upcycle/layer_error.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"

namespace upmoe {
namespace {

using Matrix = std::vector<float>;  // [tokens, model width] unless said otherwise

void to_floats(const std::byte* in, DType dtype, std::size_t count, float* out) {
  if (dtype == DType::kBF16) {
    std::transform(reinterpret_cast<const bf16*>(in), reinterpret_cast<const bf16*>(in) + count, out,
                   [](bf16 v) { return to_float(v); });
  } else {
    std::copy_n(reinterpret_cast<const float*>(in), count, out);
  }
}

// Sixteen partial sums: the order is fixed, and vector units can take them side by side.
float dot(const float* a, const float* b, std::int64_t n) {
  constexpr int kLanes = 16;
  float sum[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) sum[l] += a[i + l] * b[i + l];
  }
  for (; i < n; ++i) sum[0] += a[i] * b[i];
  return std::accumulate(sum, sum + kLanes, 0.0f);
}

// Rows of a matrix, as floats, a block at a time.
using ReadRow = std::function<void(std::int64_t row, float* out)>;

ReadRow row_of_line(const RecipeLine& line, const FillContext& context) {
  // Filling by blocks spares working out the line's units for each row.
  constexpr std::int64_t kBlock = 256;
  struct Cache {
    std::int64_t begin = -1, end = -1;
    std::vector<std::byte> bytes;
  };
  auto cache = std::make_shared<Cache>();
  return [&line, &context, cache](std::int64_t row, float* out) {
    const std::size_t row_bytes = static_cast<std::size_t>(line.columns()) * size_of(context.source.dtype());
    if (row < cache->begin || row >= cache->end) {
      cache->begin = row;
      cache->end = std::min(row + kBlock, line.rows());
      cache->bytes.resize(static_cast<std::size_t>(cache->end - cache->begin) * row_bytes);
      fill(line, cache->begin, cache->end, context, cache->bytes);
    }
    to_floats(cache->bytes.data() + static_cast<std::size_t>(row - cache->begin) * row_bytes,
              context.source.dtype(), static_cast<std::size_t>(line.columns()), out);
  };
}

ReadRow row_of_ffn(const SourceFfn& ffn, FfnMatrix matrix, DType dtype) {
  const std::int64_t columns = matrix == FfnMatrix::kDown ? ffn.width : ffn.model_width;
  return [data = ffn.data(matrix), columns, dtype](std::int64_t row, float* out) {
    to_floats(data + static_cast<std::size_t>(row * columns) * size_of(dtype), dtype,
              static_cast<std::size_t>(columns), out);
  };
}

struct SwiGlu {
  ReadRow gate, up, down;
  std::int64_t width;
};

// y = down(silu(gate x) * up x) for tokens x [count, D].
Matrix apply(const SwiGlu& ffn, const Matrix& x, std::int64_t model_width) {
  const std::int64_t count = static_cast<std::int64_t>(x.size()) / model_width;
  std::vector<float> gate(static_cast<std::size_t>(model_width)), up(gate),
      down(static_cast<std::size_t>(ffn.width));
  Matrix h(static_cast<std::size_t>(count * ffn.width)), y(x.size());
  for (std::int64_t j = 0; j < ffn.width; ++j) {
    ffn.gate(j, gate.data());
    ffn.up(j, up.data());
    for (std::int64_t t = 0; t < count; ++t) {
      const float* x_t = x.data() + t * model_width;
      const float g = dot(gate.data(), x_t, model_width);
      h[static_cast<std::size_t>(t * ffn.width + j)] =
          g / (1.0f + std::exp(-g)) * dot(up.data(), x_t, model_width);
    }
  }
  for (std::int64_t d = 0; d < model_width; ++d) {
    ffn.down(d, down.data());
    for (std::int64_t t = 0; t < count; ++t) {
      y[static_cast<std::size_t>(t * model_width + d)] =
          dot(down.data(), h.data() + t * ffn.width, ffn.width);
    }
  }
  return y;
}

SwiGlu swiglu_of(const Recipe& recipe, const std::array<int, 3>& lines, const FillContext& context) {
  const auto at = [&](FfnMatrix m) -> const RecipeLine& {
    return recipe.lines[static_cast<std::size_t>(lines[static_cast<std::size_t>(m)])];
  };
  return {row_of_line(at(FfnMatrix::kGate), context), row_of_line(at(FfnMatrix::kUp), context),
          row_of_line(at(FfnMatrix::kDown), context), at(FfnMatrix::kGate).rows()};
}

// Inputs as the layer's FFN meets them.
Matrix make_inputs(int layer, std::int64_t model_width, int tokens, const FillContext& context) {
  Matrix x(static_cast<std::size_t>(tokens * model_width));
  normal_batch(philox_key(context.seed, fmt::format("layers.{}.layer_error", layer)), 0,
               static_cast<std::int64_t>(x.size()), x.data());
  std::vector<std::byte> bytes(static_cast<std::size_t>(model_width) * size_of(context.source.dtype()));
  context.source.read(tensor_name(context.source.model().config(), Role::kNorm2, layer), 0, bytes);
  std::vector<float> weight(static_cast<std::size_t>(model_width));
  to_floats(bytes.data(), context.source.dtype(), weight.size(), weight.data());
  for (int t = 0; t < tokens; ++t) {
    float* row = x.data() + t * model_width;
    const float rms = std::sqrt(dot(row, row, model_width) / static_cast<float>(model_width));
    for (std::int64_t d = 0; d < model_width; ++d) row[d] *= weight[static_cast<std::size_t>(d)] / rms;
  }
  return x;
}

struct Choice {
  int token;
  float weight;
};

// Softmax over all experts, top-k with the lowest index winning ties; chosen tokens by expert.
std::vector<std::vector<Choice>> route(const RecipeLine& router, const Matrix& x, const ModelConfig& moe,
                                       const FillContext& context) {
  const std::int64_t D = moe.hidden_size;
  const auto experts = static_cast<std::size_t>(moe.num_experts),
             k = static_cast<std::size_t>(moe.num_experts_per_tok);
  const ReadRow read = row_of_line(router, context);
  std::vector<float> row(static_cast<std::size_t>(D));
  const std::size_t tokens = x.size() / row.size();
  std::vector<float> p_TE(tokens * experts);
  for (std::size_t e = 0; e < experts; ++e) {
    read(static_cast<std::int64_t>(e), row.data());
    for (std::size_t t = 0; t < tokens; ++t)
      p_TE[t * experts + e] = dot(row.data(), x.data() + t * row.size(), D);
  }
  std::vector<std::vector<Choice>> chosen(experts);
  std::vector<std::size_t> order(experts);
  for (std::size_t t = 0; t < tokens; ++t) {
    float* p = p_TE.data() + t * experts;
    const float top = *std::max_element(p, p + experts);
    std::transform(p, p + experts, p, [top](float l) { return std::exp(l - top); });
    const float sum = std::accumulate(p, p + experts, 0.0f);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [p](std::size_t a, std::size_t b) { return p[a] > p[b]; });
    float norm = 0;
    for (std::size_t i = 0; i < k; ++i) norm += p[order[i]];
    if (!moe.norm_topk_prob) norm = sum;
    for (std::size_t i = 0; i < k; ++i) chosen[order[i]].push_back({static_cast<int>(t), p[order[i]] / norm});
  }
  return chosen;
}

void add_routed(const Recipe& recipe, const Recipe::Layer& lines, const Matrix& x, const ModelConfig& moe,
                const FillContext& context, Matrix& y) {
  const std::int64_t D = moe.hidden_size;
  const auto chosen = route(recipe.lines[static_cast<std::size_t>(lines.router)], x, moe, context);
  for (std::size_t e = 0; e < chosen.size(); ++e) {
    if (chosen[e].empty()) continue;
    Matrix x_e;
    for (const Choice& c : chosen[e])
      x_e.insert(x_e.end(), x.begin() + c.token * D, x.begin() + (c.token + 1) * D);
    const Matrix y_e = apply(swiglu_of(recipe, lines.experts[e], context), x_e, D);
    for (std::size_t i = 0; i < chosen[e].size(); ++i) {
      for (std::int64_t d = 0; d < D; ++d) {
        y[static_cast<std::size_t>(chosen[e][i].token * D + d)] +=
            chosen[e][i].weight * y_e[i * static_cast<std::size_t>(D) + static_cast<std::size_t>(d)];
      }
    }
  }
}

void add_shared(const Recipe& recipe, const Recipe::Layer& lines, const Matrix& x, std::int64_t D,
                const FillContext& context, Matrix& y) {
  if (lines.shared_gate < 0) return;
  std::vector<float> gate(static_cast<std::size_t>(D));
  row_of_line(recipe.lines[static_cast<std::size_t>(lines.shared_gate)], context)(0, gate.data());
  const Matrix y_shared = apply(swiglu_of(recipe, lines.shared, context), x, D);
  for (std::size_t t = 0; t * gate.size() < x.size(); ++t) {
    const float open = 1.0f / (1.0f + std::exp(-dot(gate.data(), x.data() + t * gate.size(), D)));
    for (std::size_t d = 0; d < gate.size(); ++d)
      y[t * gate.size() + d] += open * y_shared[t * gate.size() + d];
  }
}

}  // namespace

double layer_error(const Recipe& recipe, int layer, const ModelConfig& moe, const FillContext& context,
                   int tokens) {
  const std::int64_t D = moe.hidden_size;
  const Matrix x = make_inputs(layer, D, tokens, context);
  const std::shared_ptr<const SourceFfn> ffn = context.source.ffn(layer);
  const DType dtype = context.source.dtype();
  const Matrix expected =
      apply({row_of_ffn(*ffn, FfnMatrix::kGate, dtype), row_of_ffn(*ffn, FfnMatrix::kUp, dtype),
             row_of_ffn(*ffn, FfnMatrix::kDown, dtype), ffn->width},
            x, D);
  Matrix y(x.size(), 0.0f);
  const Recipe::Layer& lines = recipe.layers[static_cast<std::size_t>(layer)];
  add_routed(recipe, lines, x, moe, context, y);
  add_shared(recipe, lines, x, D, context, y);
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    difference += (double{y[i]} - expected[i]) * (double{y[i]} - expected[i]);
    norm += double{expected[i]} * expected[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

}  // namespace upmoe
