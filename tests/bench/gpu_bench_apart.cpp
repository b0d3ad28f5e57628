// What one pass does, as the passes that it stands for: each fusion of small ops alone has its gain here. The names are
// those of the fused ones, with `_apart`, and both are timed in one run (gpu_record.py sets them side by side).

#include "kernels/ops/activation.h"
#include "kernels/ops/attention.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/routing.h"
#include "tests/bench/gpu_bench.h"

namespace upmoe::bench {

namespace {

void add_norms(const std::string& name, std::int64_t t) {
  const std::int64_t d = shape().width;
  add("add_rms_norm_forward_apart/" + name, [=] {
    const Held y = make({t, d}), sum = make({t, d}), rstd = make({t}, DType::kF32), x = make({t, d}),
               residual = make({t, d}), w = make({d});
    return [=](Exec& ex) {
      ops::add(ex, sum->view, x->view, residual->view);
      ops::rms_norm_forward(ex, y->view, rstd->view, sum->view, {w->view, 1e-6f});
    };
  });
  add("rms_norm_backward_apart/" + name, [=] {  // the stream's gradient is added to by a pass of its own
    const Held dx = make({t, d}), branch = make({t, d}), dw = make({d}), dy = make({t, d}), x = make({t, d}),
               w = make({d}), rstd = make({t}, DType::kF32);
    return [=](Exec& ex) {
      ops::rms_norm_backward(ex, branch->view, dw->view, dy->view, {x->view, rstd->view}, {w->view, 1e-6f},
                             Accumulate::kOverwrite);
      ops::add(ex, dx->view, dx->view, branch->view);
    };
  });
}

void add_rope(const std::string& name, std::int64_t t) {
  const ModelShape& m = shape();
  const AttentionShape a{m.heads, m.heads, m.head_dim, std::min(m.seq_len, t), 0};
  add("rope_backward_apart/" + name, [=] {
    const Held dqkv = make({t, a.qkv_width()}), db = make({a.qkv_width()}),
               positions = make({t}, DType::kI32, a.seq_len);
    return [=](Exec& ex) {
      ops::rope(ex, dqkv->view, positions->view, a, 1e6, /*inverse=*/true);
      ops::bias_backward(ex, db->view, dqkv->view);
    };
  });
}

void add_sums_of_rows(const std::string& name, std::int64_t t) {
  const ModelShape& m = shape();
  const std::int64_t d = m.width, rows = t * m.top_k, k = m.top_k;
  add("gather_sum_rows_residual_apart/" + name, [=] {
    const Held y = make({t, d}), in = make({rows, d}), slot = shuffled({t, k}), routed = make({t, d}),
               h = make({t, d});
    return [=](Exec& ex) {
      ops::gather_sum_rows(ex, routed->view, in->view, slot->view);
      ops::add(ex, y->view, y->view, routed->view);
      ops::add(ex, y->view, y->view, h->view);
    };
  });
  // With the gradient of the gate's weight, which is a pass of its own either way.
  for (const bool apart : {false, true})
    add((apart ? "gather_sum_rows_gate_whole_apart/" : "gather_sum_rows_gate_whole/") + name, [=] {
      const Held dx = make({t, d}), in = make({rows, d}), slot = shuffled({t, k}), routed = make({t, d}),
                 w = make({1, d}), dw = make({1, d}), x = make({t, d}), dgate = make({t}, DType::kF32),
                 gate = make({t}, DType::kF32);
      return [=](Exec& ex) {
        if (apart) {
          ops::gather_sum_rows(ex, routed->view, in->view, slot->view);
          ops::add(ex, dx->view, dx->view, routed->view);
        } else {
          ops::gather_sum_rows(ex, dx->view, in->view, slot->view,
                               {.base_TD = dx->view, .gate = {dgate->view, gate->view, w->view}});
        }
        ops::sigmoid_gate_backward(ex, apart ? dx->view : TensorView{}, dw->view, dgate->view, gate->view,
                                   x->view, w->view);
      };
    });
}

}  // namespace

void add_apart(std::int64_t tokens) {
  const std::string name = fmt::format("{}", tokens);
  add_norms(name, tokens);
  add_rope(name, tokens);
  add_sums_of_rows(name, tokens);
}

}  // namespace upmoe::bench
