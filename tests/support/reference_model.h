#pragma once
// The ops once more, naive and in double: loops as the formulas stand. Gradients by central differences where
// the size allows, closed forms where not.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/ops/attention.h"

namespace upmoe::test {

using Values = std::vector<double>;

// df/dx by central differences; f is a scalar function of the whole vector.
inline Values numeric_gradient(const std::function<double(const Values&)>& f, Values x, double step = 1e-5) {
  Values gradient(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double middle = x[i];
    x[i] = middle + step;
    const double above = f(x);
    x[i] = middle - step;
    gradient[i] = (above - f(x)) / (2 * step);
    x[i] = middle;
  }
  return gradient;
}

inline double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

inline Values sum_of(Values a, const Values& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

inline double reference_sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// x [T, D], w [D].
inline Values reference_rms_norm(const Values& x, const Values& w, double eps, Values* rstd = nullptr) {
  const std::size_t width = w.size();
  Values y(x.size());
  for (std::size_t t = 0; t < x.size() / width; ++t) {
    double squares = 0;
    for (std::size_t d = 0; d < width; ++d) squares += x[t * width + d] * x[t * width + d];
    const double r = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
    if (rstd != nullptr) rstd->push_back(r);
    for (std::size_t d = 0; d < width; ++d) y[t * width + d] = w[d] * x[t * width + d] * r;
  }
  return y;
}

struct ReferenceMoments {
  Values mean, rstd;
};
inline Values reference_layer_norm(const Values& x, const Values& w, double eps,
                                   ReferenceMoments* moments = nullptr) {
  const std::size_t width = w.size();
  Values y(x.size());
  for (std::size_t t = 0; t < x.size() / width; ++t) {
    double mean = 0, squares = 0;
    for (std::size_t d = 0; d < width; ++d) mean += x[t * width + d] / static_cast<double>(width);
    for (std::size_t d = 0; d < width; ++d) squares += (x[t * width + d] - mean) * (x[t * width + d] - mean);
    const double r = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
    if (moments != nullptr) {
      moments->mean.push_back(mean);
      moments->rstd.push_back(r);
    }
    for (std::size_t d = 0; d < width; ++d) y[t * width + d] = w[d] * (x[t * width + d] - mean) * r;
  }
  return y;
}

// The heads of queries and keys of qkv, each normed with the weight of its kind.
inline Values reference_qk_norm(Values qkv, const Values& q_weight, const Values& k_weight, double eps,
                                const AttentionShape& s) {
  const auto width = static_cast<std::size_t>(s.qkv_width()), dim = static_cast<std::size_t>(s.head_dim);
  for (std::size_t token = 0; token < qkv.size(); token += width)
    for (std::size_t h = 0; h < static_cast<std::size_t>(s.heads + s.kv_heads); ++h) {
      const auto head = qkv.begin() + static_cast<std::ptrdiff_t>(token + h * dim);
      const bool query = h < static_cast<std::size_t>(s.heads);
      const Values normed =
          reference_rms_norm(Values(head, head + s.head_dim), query ? q_weight : k_weight, eps);
      std::copy(normed.begin(), normed.end(), head);
    }
  return qkv;
}

inline double reference_silu(double x) {
  return x * reference_sigmoid(x);
}
inline double reference_gelu_tanh(double x) {
  return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

// gate_up [R, 2F] as pairs; weight [R] or empty (1).
inline Values reference_gated(double (*act)(double), const Values& gate_up, const Values& weight,
                              std::size_t rows) {
  Values h(gate_up.size() / 2);
  const std::size_t width = rows == 0 ? 0 : h.size() / rows;
  for (std::size_t i = 0; i < h.size(); ++i)
    h[i] = act(gate_up[2 * i]) * gate_up[2 * i + 1] * (weight.empty() ? 1 : weight[i / width]);
  return h;
}
inline Values reference_swiglu(const Values& gate_up, const Values& weight, std::size_t rows) {
  return reference_gated(reference_silu, gate_up, weight, rows);
}

inline Values reference_gate(const Values& x, const Values& w) {
  Values gate(x.size() / w.size());
  for (std::size_t t = 0; t < gate.size(); ++t) {
    double logit = 0;
    for (std::size_t d = 0; d < w.size(); ++d) logit += x[t * w.size() + d] * w[d];
    gate[t] = reference_sigmoid(logit);
  }
  return gate;
}

inline double reference_lse(const double* x, std::size_t n) {
  const double largest = *std::max_element(x, x + n);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += std::exp(x[i] - largest);
  return largest + std::log(sum);
}

// Softmax of each row of `width`.
inline Values reference_softmax(const Values& x, std::size_t width) {
  Values p(x.size());
  for (std::size_t row = 0; row + width <= x.size(); row += width) {
    const double lse = reference_lse(x.data() + row, width);
    for (std::size_t i = 0; i < width; ++i) p[row + i] = std::exp(x[row + i] - lse);
  }
  return p;
}

// The indices of the k largest, in falling order, the lowest first among equals.
inline std::vector<std::int32_t> reference_top_k(const double* p, std::size_t n, std::size_t k) {
  std::vector<std::int32_t> index(n);
  for (std::size_t i = 0; i < n; ++i) index[i] = static_cast<std::int32_t>(i);
  std::stable_sort(index.begin(), index.end(), [p](std::int32_t a, std::int32_t b) { return p[a] > p[b]; });
  index.resize(k);
  return index;
}

inline Values reference_rope(Values qkv, const std::vector<std::int32_t>& positions, const AttentionShape& s,
                             double theta, bool inverse) {
  const auto width = static_cast<std::size_t>(s.qkv_width()), half = static_cast<std::size_t>(s.head_dim / 2);
  for (std::size_t t = 0; t < positions.size(); ++t)
    for (std::size_t h = 0; h < static_cast<std::size_t>(s.heads + s.kv_heads); ++h)
      for (std::size_t i = 0; i < half; ++i) {
        const double angle =
            positions[t] * std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(s.head_dim));
        const double c = std::cos(angle), n = inverse ? -std::sin(angle) : std::sin(angle);
        double& a = qkv[t * width + h * 2 * half + i];
        double& b = qkv[t * width + h * 2 * half + half + i];
        const double rotated = a * c - b * n;
        b = b * c + a * n;
        a = rotated;
      }
  return qkv;
}

struct AttentionReference {
  Values out, lse, dqkv;
};

// Whole score rows, plain softmax. `dout` may be empty: no backward. `document` may be empty.
inline AttentionReference reference_attention(const Values& qkv, const AttentionShape& s, std::int64_t tokens,
                                              const std::vector<std::int32_t>& document,
                                              const Values& dout = {}) {
  const std::int64_t width = s.qkv_width(), dim = s.head_dim;
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  AttentionReference r{Values(at(tokens * s.heads * dim)), Values(at(tokens * s.heads)), Values(qkv.size())};
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const std::int64_t kv = h / (s.heads / s.kv_heads), q = t * width + h * dim;
      const std::int64_t k = (s.heads + kv) * dim, v = k + s.kv_heads * dim, o = (t * s.heads + h) * dim;
      std::vector<std::int64_t> seen;
      Values score;
      for (std::int64_t j = t / s.seq_len * s.seq_len; j <= t; ++j) {
        if (s.window > 0 && j <= t - s.window) continue;
        if (!document.empty() && document[at(j)] != document[at(t)]) continue;
        double product = 0;
        for (std::int64_t d = 0; d < dim; ++d) product += qkv[at(q + d)] * qkv[at(j * width + k + d)];
        seen.push_back(j);
        score.push_back(product * scale);
      }
      const double lse = r.lse[at(t * s.heads + h)] = reference_lse(score.data(), score.size());
      for (std::size_t i = 0; i < seen.size(); ++i)
        for (std::int64_t d = 0; d < dim; ++d)
          r.out[at(o + d)] += std::exp(score[i] - lse) * qkv[at(seen[i] * width + v + d)];
      if (dout.empty()) continue;
      double delta = 0;
      for (std::int64_t d = 0; d < dim; ++d) delta += dout[at(o + d)] * r.out[at(o + d)];
      for (std::size_t i = 0; i < seen.size(); ++i) {
        const std::int64_t row = seen[i] * width;
        const double p = std::exp(score[i] - lse);
        double dp = 0;
        for (std::int64_t d = 0; d < dim; ++d) dp += dout[at(o + d)] * qkv[at(row + v + d)];
        const double ds = p * (dp - delta) * scale;
        for (std::int64_t d = 0; d < dim; ++d) {
          r.dqkv[at(row + v + d)] += p * dout[at(o + d)];
          r.dqkv[at(row + k + d)] += ds * qkv[at(q + d)];
          r.dqkv[at(q + d)] += ds * qkv[at(row + k + d)];
        }
      }
    }
  return r;
}

}  // namespace upmoe::test
