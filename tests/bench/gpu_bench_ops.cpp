// Single ops at the shapes of one layer and of the whole model's ends, bf16.

#include <algorithm>
#include <numeric>
#include <random>

#include "kernels/core/philox.h"
#include "kernels/ops/activation.h"
#include "kernels/ops/adamw8bit.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/attention_decode.h"
#include "kernels/ops/distillation.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/layer_norm.h"
#include "kernels/ops/loss.h"
#include "kernels/ops/moment_codes.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pack.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"
#include "kernels/ops/transfer.h"
#include "tests/bench/gpu_bench.h"

namespace upmoe::bench {

namespace {

constexpr DType kFloat = DType::kBF16;
// Rows per expert as an untrained router gives them.
struct Offsets {
  std::vector<std::int64_t> on_host;
  Held on_device;
  // NOLINTNEXTLINE(google-explicit-constructor): as it is
  operator ExpertRows() const { return {on_device->view, on_host}; }
};
Offsets random_offsets(std::int64_t rows) {
  std::minstd_rand random(3);
  const auto experts = static_cast<std::size_t>(shape().experts);
  std::vector<std::int32_t> offsets(experts + 1);
  for (std::int64_t r = 0; r < rows; ++r) ++offsets[random() % experts + 1];
  for (std::size_t i = 0; i < experts; ++i) offsets[i + 1] += offsets[i];
  const Held on_device = make({shape().experts + 1}, DType::kI32, 1);
  ops::upload(exec(), on_device->view,
              host_view(static_cast<const std::int32_t*>(offsets.data()), on_device->view.shape));
  return {{offsets.begin(), offsets.end()}, on_device};
}

// A Linear weight [n, k] over all tokens.
void add_linear(const std::string& name, std::int64_t t, std::int64_t n, std::int64_t k) {
  add("gemm_forward/" + name, [=] {
    const Held y = make({t, n}), x = make({t, k}), w = make({n, k});
    return [=](Exec& ex) {
      ops::gemm(ex, y->view, {x->view}, {w->view, Transpose::kYes}, Accumulate::kOverwrite);
    };
  });
  add("gemm_dgrad/" + name, [=] {
    const Held dx = make({t, k}), dy = make({t, n}), w = make({n, k});
    return [=](Exec& ex) { ops::gemm(ex, dx->view, {dy->view}, {w->view}, Accumulate::kOverwrite); };
  });
  add("gemm_wgrad/" + name, [=] {
    const Held dw = make({n, k}), dy = make({t, n}), x = make({t, k});
    return [=](Exec& ex) {
      ops::gemm(ex, dw->view, {dy->view, Transpose::kYes}, {x->view}, Accumulate::kAdd);
    };
  });
}

void add_grouped(const std::string& name, std::int64_t rows, std::int64_t n, std::int64_t k) {
  const std::int64_t e = shape().experts;
  add("grouped_gemm_forward/" + name, [=] {
    const Held y = make({rows, n}), x = make({rows, k}), w = make({e, n, k});
    return [=, offsets = random_offsets(rows)](Exec& ex) {
      ops::grouped_gemm_forward(ex, y->view, x->view, w->view, offsets);
    };
  });
  add("grouped_gemm_dgrad/" + name, [=] {
    const Held dx = make({rows, k}), dy = make({rows, n}), w = make({e, n, k});
    return [=, offsets = random_offsets(rows)](Exec& ex) {
      ops::grouped_gemm_dgrad(ex, dx->view, dy->view, w->view, offsets);
    };
  });
  for (const Accumulate mode : {Accumulate::kAdd, Accumulate::kOverwrite})  // the first of a step overwrites
    add((mode == Accumulate::kAdd ? "grouped_gemm_wgrad/" : "grouped_gemm_wgrad_first/") + name, [=] {
      const Held dw = make({e, n, k}), dy = make({rows, n}), x = make({rows, k});
      return [=, offsets = random_offsets(rows)](Exec& ex) {
        ops::grouped_gemm_wgrad(ex, dw->view, dy->view, x->view, offsets, mode);
      };
    });
}

void add_attention(const std::string& name, std::int64_t t, std::int64_t window = 0) {
  const ModelShape& m = shape();
  const AttentionShape a{m.heads, m.heads, m.head_dim, std::min(m.seq_len, t), window};
  const std::int64_t q = m.heads * m.head_dim;
  add("attention_forward/" + name, [=] {
    const Held out = make({t, q}), lse = make({t, a.heads}, DType::kF32), qkv = make({t, a.qkv_width()});
    return [=](Exec& ex) { ops::attention_forward(ex, out->view, lse->view, qkv->view, a); };
  });
  for (const bool deterministic : {true, false})
    add((deterministic ? "attention_backward/" : "attention_backward_any_order/") + name, [=] {
      const Held out = make({t, q}), lse = make({t, a.heads}, DType::kF32), qkv = make({t, a.qkv_width()}),
                 dqkv = make({t, a.qkv_width()}), dout = make({t, q});
      ops::attention_forward(exec(), out->view, lse->view, qkv->view, a);
      return [=](Exec& ex) {
        Exec one = ex;
        one.deterministic = deterministic;
        ops::attention_backward(one, dqkv->view, dout->view, qkv->view, {out->view, lse->view}, a);
      };
    });
  if (window > 0) return;
  add("qk_norm_forward/" + name, [=] {
    const Held qkv = make({t, a.qkv_width()}), x = make({t, 2 * q}),
               rstd = make({t, 2 * a.heads}, DType::kF32), w = make({a.head_dim});
    return [=](Exec& ex) {
      ops::qk_norm_forward(ex, qkv->view, x->view, rstd->view, {w->view, w->view, 1e-6f}, a);
    };
  });
  add("qk_norm_backward/" + name, [=] {
    const Held dqkv = make({t, a.qkv_width()}), x = make({t, 2 * q}),
               rstd = make({t, 2 * a.heads}, DType::kF32), w = make({a.head_dim}), dq = make({a.head_dim}),
               dk = make({a.head_dim});
    return [=](Exec& ex) {
      ops::qk_norm_backward(ex, dqkv->view, {dq->view, dk->view}, x->view, rstd->view,
                            {w->view, w->view, 1e-6f}, a);
    };
  });
  add("rope/" + name, [=] {
    const Held qkv = make({t, a.qkv_width()}), positions = make({t}, DType::kI32, a.seq_len);
    return [=](Exec& ex) { ops::rope(ex, qkv->view, positions->view, a, 1e6, false); };
  });
  add("rope_backward/" + name, [=] {
    const Held dqkv = make({t, a.qkv_width()}), db = make({a.qkv_width()}),
               positions = make({t}, DType::kI32, a.seq_len);
    return [=](Exec& ex) { ops::rope_backward(ex, dqkv->view, db->view, positions->view, a, 1e6); };
  });
}

// What some models have: LayerNorms, and a limit on queries, keys and values.
void add_layer_norm(const std::string& name, std::int64_t t) {
  const std::int64_t d = shape().width;
  add("layer_norm_forward/" + name, [=] {
    const Held y = make({t, d}), mean = make({t}, DType::kF32), rstd = make({t}, DType::kF32),
               x = make({t, d}), w = make({d});
    return [=](Exec& ex) {
      ops::layer_norm_forward(ex, y->view, {mean->view, rstd->view}, x->view, w->view, 1e-5f);
    };
  });
  add("layer_norm_backward/" + name, [=] {
    const Held dx = make({t, d}), dw = make({d}), dy = make({t, d}), x = make({t, d}), w = make({d}),
               mean = make({t}, DType::kF32), rstd = make({t}, DType::kF32);
    return [=](Exec& ex) {
      ops::layer_norm_backward(ex, dx->view, dw->view, dy->view, {x->view, mean->view, rstd->view}, w->view,
                               Accumulate::kAdd);
    };
  });
  add("clip/" + name, [=] {
    const Held out = make({t, 3 * d}), in = make({t, 3 * d});
    return [=](Exec& ex) { ops::clip(ex, out->view, in->view, 8.0f); };
  });
}

void add_rows(const std::string& name, std::int64_t t) {
  const ModelShape& m = shape();
  const std::int64_t d = m.width, rows = t * m.top_k, f = m.expert_width, k = m.top_k;
  add("add_rms_norm_forward/" + name, [=] {
    const Held y = make({t, d}), sum = make({t, d}), rstd = make({t}, DType::kF32), x = make({t, d}),
               residual = make({t, d}), w = make({d});
    return [=](Exec& ex) {
      ops::add_rms_norm_forward(ex, y->view, sum->view, rstd->view, x->view, residual->view,
                                {w->view, 1e-6f});
    };
  });
  add("rms_norm_backward/" + name, [=] {
    const Held dx = make({t, d}), dw = make({d}), dy = make({t, d}), x = make({t, d}), w = make({d}),
               rstd = make({t}, DType::kF32);
    return [=](Exec& ex) {
      ops::rms_norm_backward(ex, dx->view, dw->view, dy->view, {x->view, rstd->view}, {w->view, 1e-6f},
                             Accumulate::kAdd);
    };
  });
  for (const bool gelu : {false, true}) {
    const std::string op = gelu ? "geglu" : "swiglu";
    add(op + "_forward/" + name, [=] {
      const Held h = make({rows, f}), g = make({rows, 2 * f}), w = make({rows}, DType::kF32);
      return [=](Exec& ex) {
        const ConstTensorView weight = w->view;
        (gelu ? ops::geglu_forward : ops::swiglu_forward)(ex, h->view, g->view, weight);
      };
    });
    add(op + "_backward/" + name, [=] {
      const Held dg = make({rows, 2 * f}), dw = make({rows}, DType::kF32), dh = make({rows, f}),
                 g = make({rows, 2 * f}), w = make({rows}, DType::kF32);
      return [=](Exec& ex) {
        const ConstTensorView weight = w->view;
        (gelu ? ops::geglu_backward : ops::swiglu_backward)(ex, dg->view, dw->view, dh->view, g->view,
                                                            weight);
      };
    });
  }
  add("gather_rows/" + name, [=] {
    const Held out = make({rows, d}), in = make({t, d}), index = shuffled({rows});
    return [=](Exec& ex) { ops::gather_rows(ex, out->view, in->view, index->view, k); };
  });
  add("gather_sum_rows/" + name, [=] {
    const Held y = make({t, d}), in = make({rows, d}), slot = shuffled({t, k});
    return [=](Exec& ex) { ops::gather_sum_rows(ex, y->view, in->view, slot->view, {.base_TD = y->view}); };
  });
  add("gather_sum_rows_residual/" + name, [=] {  // forward: the shared expert's output and the residual
    const Held y = make({t, d}), in = make({rows, d}), slot = shuffled({t, k}), h = make({t, d});
    return [=](Exec& ex) {
      ops::gather_sum_rows(ex, y->view, in->view, slot->view, {.base_TD = y->view, .residual_TD = h->view});
    };
  });
  add("gather_sum_rows_gate/" + name, [=] {  // backward: the shared expert's gradient and its gate's share
    const Held dx = make({t, d}), in = make({rows, d}), slot = shuffled({t, k}), w = make({1, d}),
               dgate = make({t}, DType::kF32), gate = make({t}, DType::kF32);
    return [=](Exec& ex) {
      ops::gather_sum_rows(ex, dx->view, in->view, slot->view,
                           {.base_TD = dx->view, .gate = {dgate->view, gate->view, w->view}});
    };
  });
  add("sort_by_expert/" + name, [=] {
    const Held order = make({rows}, DType::kI32, 1), slot = make({t, k}, DType::kI32, 1),
               counts = make({m.experts}, DType::kI32, 1), index = make({t, k}, DType::kI32, m.experts);
    return [=](Exec& ex) { ops::sort_by_expert(ex, order->view, slot->view, counts->view, index->view); };
  });
}

void add_cross_entropy(std::int64_t chunk) {
  const ModelShape& m = shape();
  for (const auto& [name_of_path, path] : {std::pair("cross_entropy", CrossEntropyPath::kPortable),
                                           {"cross_entropy_clusters", CrossEntropyPath::kClusters}})
    add(fmt::format("{}/{}", name_of_path, chunk), [=, path = path] {
      const Held loss = make({chunk}, DType::kF32), logits = make({chunk, m.vocab}, DType::kF32),
                 targets = make({chunk}, DType::kI32, m.vocab), dlogits = make({chunk, m.vocab});
      return [=](Exec& ex) {
        Exec by_path = ex;
        by_path.cross_entropy = path;
        ops::cross_entropy(by_path, {loss->view, dlogits->view, 1.0f}, logits->view, targets->view);
      };
    });
}

void add_ends(const std::string& name, std::int64_t t) {
  const ModelShape& m = shape();
  const std::int64_t chunk = std::min<std::int64_t>(t, 4096);
  add("embedding_backward/" + name, [=] {
    const Held dw = make({m.vocab, m.width}), dx = make({t, m.width}),
               tokens = make({t}, DType::kI32, m.vocab);
    return [=](Exec& ex) { ops::embedding_backward(ex, dw->view, dx->view, tokens->view); };
  });
  add_cross_entropy(chunk);
  add(fmt::format("cross_entropy_loss/{}", chunk), [=] {  // evaluation
    const Held loss = make({chunk}, DType::kF32), logits = make({chunk, m.vocab}, DType::kF32),
               targets = make({chunk}, DType::kI32, m.vocab);
    return [=](Exec& ex) { ops::cross_entropy(ex, {loss->view, {}, 1.0f}, logits->view, targets->view); };
  });
  add(fmt::format("cross_entropy_fp32/{}", chunk), [=] {  // in place
    const Held loss = make({chunk}, DType::kF32), logits = make({chunk, m.vocab}, DType::kF32),
               targets = make({chunk}, DType::kI32, m.vocab);
    return [=](Exec& ex) {
      ops::cross_entropy(ex, {loss->view, logits->view, 1.0f}, logits->view, targets->view);
    };
  });
  add(fmt::format("cross_entropy_sharded/{}", chunk), [=] {  // a half of the vocabulary, as under tp = 2
    const std::int64_t half = m.vocab / 2;
    const Held loss = make({chunk}, DType::kF32), logits = make({chunk, half}, DType::kF32),
               targets = make({chunk}, DType::kI32, m.vocab), dlogits = make({chunk, half}),
               stats = make({1, chunk, 3}, DType::kF64);
    return [=](Exec& ex) {
      ops::cross_entropy_stats(ex, stats->view.reshape({chunk, 3}), logits->view, targets->view,
                               {0, m.vocab});
      ops::cross_entropy_sharded(ex, {loss->view, dlogits->view, 1.0f}, logits->view, targets->view,
                                 stats->view, {0, m.vocab});
    };
  });
  add(fmt::format("distillation/{}", chunk), [=] {
    const Held loss = make({chunk}, DType::kF32), divergence = make({chunk}, DType::kF32),
               logits = make({chunk, m.vocab}, DType::kF32), teacher = make({chunk, m.vocab}, DType::kF32),
               targets = make({chunk}, DType::kI32, m.vocab), dlogits = make({chunk, m.vocab}),
               stats = make({1, chunk, kDistillationStats}, DType::kF64);
    return [=](Exec& ex) {
      const DistilledRows rows{logits->view, teacher->view, targets->view, {0, m.vocab}};
      ops::distillation_stats(ex, stats->view.reshape({chunk, kDistillationStats}), rows, 2);
      ops::distillation_losses(ex, {loss->view, divergence->view, dlogits->view, 1.0f}, rows, stats->view,
                               {0.5, 2});
    };
  });
  add(fmt::format("gemm_logits/{}", chunk), [=] {
    const Held logits = make({chunk, m.vocab}, DType::kF32), x = make({chunk, m.width}),
               w = make({m.vocab, m.width});
    return [=](Exec& ex) {
      ops::gemm(ex, logits->view, {x->view}, {w->view, Transpose::kYes}, Accumulate::kOverwrite);
    };
  });
  add(fmt::format("gemm_dgrad/logits/{}", chunk), [=] {
    const Held dx = make({chunk, m.width}), dlogits = make({chunk, m.vocab}), w = make({m.vocab, m.width});
    return [=](Exec& ex) { ops::gemm(ex, dx->view, {dlogits->view}, {w->view}, Accumulate::kOverwrite); };
  });
  add(fmt::format("gemm_wgrad/logits/{}", chunk), [=] {
    const Held dw = make({m.vocab, m.width}), dlogits = make({chunk, m.vocab}), x = make({chunk, m.width});
    return [=](Exec& ex) {
      ops::gemm(ex, dw->view, {dlogits->view, Transpose::kYes}, {x->view}, Accumulate::kAdd);
    };
  });
}

// The second chunk of a prompt of generation, over the first one, by tiles and token by token.
void add_chunk(std::int64_t t) {
  const ModelShape& m = shape();
  const std::int64_t n = std::min<std::int64_t>(t, 2048), q = m.heads * m.head_dim;
  const AttentionShape a{m.heads, m.heads, m.head_dim, 0};
  std::vector<std::int32_t> positions(static_cast<std::size_t>(n));
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(n));
  for (const bool as_run : {true, false})
    add(fmt::format("{}/{}", as_run ? "attention_chunk" : "attention_chunk_by_tokens", n), [=] {
      const Held out = make({n, q}), qkv = make({n, a.qkv_width()}), k = make({1, 2 * n, q}),
                 v = make({1, 2 * n, q}), row = make({n}, DType::kI32, 1),
                 position = make({n}, DType::kI32, 1);
      ops::upload(exec(), position->view,
                  host_view(static_cast<const std::int32_t*>(positions.data()), position->view.shape));
      return [=](Exec& ex) {
        ops::attention_decode(ex, out->view, qkv->view, {k->view, v->view},
                              {row->view, position->view, n * n + n * (n + 1) / 2, as_run ? n : 0}, a);
      };
    });
}

// Over the parameters of one layer's experts.
void add_optimizers() {
  const ModelShape& m = shape();
  const std::int64_t n = m.experts * 3 * m.expert_width * m.width;
  add("adamw", [=] {
    const Held w = make({n}), g = make({n}), master = make({n}, DType::kF32), mean = make({n}, DType::kF32),
               v = make({n}, DType::kF32);
    ops::fill(exec(), v->view, 0.5f);
    return [=](Exec& ex) {
      ops::adamw(ex, w->view, master->view, mean->view, v->view, g->view, AdamWStep{.lr = 1e-4f});
    };
  });
  add("adamw8bit", [=] {
    const std::int64_t blocks = moment_blocks(0, n);
    const Held w = make({n}), g = make({n}), m_code = make({n}, DType::kU8), v_code = make({n}, DType::kU8),
               m_scale = make({blocks}, DType::kF32), v_scale = make({blocks}, DType::kF32);
    ops::fill(exec(), m_scale->view, 0.0f);
    ops::fill(exec(), v_scale->view, 0.0f);
    return [=](Exec& ex) {
      ops::adamw8bit(ex, w->view, {m_code->view, v_code->view, m_scale->view, v_scale->view, 0}, g->view,
                     AdamWStep{.lr = 1e-4f}, {1, FlatIndex({0}, {n}, {n})});
    };
  });
  add("pack_parts", [=] {
    const Held gate_up = make({n / 3 * 2}), down = make({n / 3});
    const PackedParts packing({gate_up->view.elements(), down->view.elements()}, 64);
    const Held packed = make({packing.parts(), packing.slice()});
    return [=](Exec& ex) {
      const std::vector<ConstTensorView> tensors{gate_up->view, down->view};
      ops::pack_parts(ex, packed->view, tensors, packing);
    };
  });
  add("sum_of_squares", [=] {
    const Held x = make({n}), sum = make({1}, DType::kF64);
    return [=](Exec& ex) { ops::sum_of_squares(ex, sum->view, ops::only(x->view)); };
  });
}

}  // namespace

void add_ops(std::int64_t t) {
  const ModelShape& m = shape();
  const std::string name = fmt::format("{}", t);
  static bool first = true;
  if (first) add_optimizers();
  first = false;
  add_linear("output/" + name, t, m.width, m.width);
  add_linear("qkv/" + name, t, 3 * m.width, m.width);
  add_linear("shared_gate_up/" + name, t, 2 * m.shared_width, m.width);
  add_linear("shared_down/" + name, t, m.width, m.shared_width);
  add_linear("router/" + name, t, m.experts, m.width);
  add_grouped("gate_up/" + name, t * m.top_k, 2 * m.expert_width, m.width);
  add_grouped("down/" + name, t * m.top_k, m.width, m.expert_width);
  add_attention(name, t);
  add_attention(name + "_window", t, 512);
  add_chunk(t);
  add_layer_norm(name, t);
  add_rows(name, t);
  add_routers(name, t);
  add_ends(name, t);
}

}  // namespace upmoe::bench
