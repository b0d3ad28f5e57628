// What routers compute, at the shapes of one layer.

#include "kernels/ops/activation.h"
#include "kernels/ops/capacity.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/noisy_routing.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/router_draws.h"
#include "kernels/ops/routing.h"
#include "kernels/ops/sigmoid_routing.h"
#include "kernels/ops/token_groups.h"
#include "tests/bench/gpu_bench.h"

namespace upmoe::bench {

namespace {

// Every position of a permutation of [0, n).
// What routers do in training alone.
void add_router_training(const std::string& name, std::int64_t t) {
  const ModelShape& m = shape();
  const std::int64_t e = m.experts, k = m.top_k;
  for (const bool weighed : {false, true})
    add(std::string(weighed ? "limit_choices_weighed/" : "limit_choices/") + name, [=] {
      const Held kept = make({t, k}, DType::kI32, e), lost = make({1, e}, DType::kF32),
                 index = make({t, k}, DType::kI32, e), weight = make({t, k}, DType::kF32),
                 row = shuffled({t});
      return [=](Exec& ex) {
        ops::limit_choices(
            ex, kept->view, lost->view,
            {index->view, weighed ? ConstTensorView(weight->view) : ConstTensorView{}, row->view},
            {t, t * k / e});
      };
    });
  add("jitter/" + name, [=] {
    const Held y = make({t, m.width}), x = make({t, m.width}), place = shuffled({t});
    return [=](Exec& ex) {
      ops::jitter(ex, y->view, x->view, {1, 0, 0, place->view}, 0.01f, Accumulate::kOverwrite);
    };
  });
  add("add_router_noise/" + name, [=] {
    const Held noisy = make({t, e}, DType::kF32), logits = make({t, e}, DType::kF32),
               scale = make({t, e}, DType::kF32), place = shuffled({t});
    return [=](Exec& ex) {
      ops::add_router_noise(ex, noisy->view, logits->view, scale->view, {1, 0, 0, place->view});
    };
  });
  add("noisy_load/" + name, [=] {
    const Held load = make({e}, DType::kF64), noisy = make({t, e}, DType::kF32),
               logits = make({t, e}, DType::kF32), scale = make({t, e}, DType::kF32),
               index = make({t, k}, DType::kI32, e);
    return [=](Exec& ex) {
      ops::noisy_load(ex, load->view, {logits->view, scale->view, noisy->view, index->view});
    };
  });
}

void add_router(const std::string& name, std::int64_t t) {
  const ModelShape& m = shape();
  const std::int64_t e = m.experts, k = m.top_k;
  add("route_tokens/" + name, [=] {
    const Held probs = make({t, e}, DType::kF32), index = make({t, k}, DType::kI32, e),
               weight = make({t, k}, DType::kF32), lse = make({t}, DType::kF32),
               logits = make({t, e}, DType::kF32);
    return [=](Exec& ex) {
      ops::route_tokens(ex, probs->view, index->view, weight->view, lse->view, logits->view, false);
    };
  });
  add("route_tokens_backward/" + name, [=] {
    const Held dlogits = make({t, e}, DType::kF32), dweight = make({t, k}, DType::kF32),
               aux = make({e}, DType::kF32), probs = make({t, e}, DType::kF32),
               index = make({t, k}, DType::kI32, e), weight = make({t, k}, DType::kF32),
               lse = make({t}, DType::kF32);
    return [=](Exec& ex) {
      ops::route_tokens_backward(ex, dlogits->view, dweight->view, {aux->view},
                                 {probs->view, index->view, weight->view, lse->view}, false);
    };
  });
  add("route_sigmoid/" + name, [=] {
    const Held probs = make({t, e}, DType::kF32), index = make({t, k}, DType::kI32, e),
               weight = make({t, k}, DType::kF32), lse = make({t}, DType::kF32),
               logits = make({t, e}, DType::kF32), bias = make({e}, DType::kF32);
    return [=](Exec& ex) {
      ops::route_sigmoid(ex, {probs->view, index->view, weight->view, lse->view}, logits->view, bias->view,
                         {});
    };
  });
  add("route_sigmoid_backward/" + name, [=] {
    const Held dlogits = make({t, e}, DType::kF32), dweight = make({t, k}, DType::kF32),
               aux = make({e}, DType::kF32), logits = make({t, e}, DType::kF32),
               index = make({t, k}, DType::kI32, e), lse = make({t}, DType::kF32);
    return [=](Exec& ex) {
      ops::route_sigmoid_backward(ex, dlogits->view, dweight->view, {aux->view},
                                  {logits->view, index->view, lse->view}, {});
    };
  });
  add("balance_stats/" + name, [=] {
    const Held stats = make({3, e}, DType::kF64), z = make({1}, DType::kF64),
               probs = make({t, e}, DType::kF32), index = make({t, k}, DType::kI32, e),
               lse = make({t}, DType::kF32);
    return
        [=](Exec& ex) { ops::balance_stats(ex, stats->view, z->view, probs->view, index->view, lse->view); };
  });
  add("sigmoid_gate_backward/" + name, [=] {
    const Held dx = make({t, m.width}), dw = make({1, m.width}), dgate = make({t}, DType::kF32),
               gate = make({t}, DType::kF32), x = make({t, m.width}), w = make({1, m.width});
    return [=](Exec& ex) {
      ops::sigmoid_gate_backward(ex, dx->view, dw->view, dgate->view, gate->view, x->view, w->view);
    };
  });
  add("bias_backward/" + name, [=] {
    const Held db = make({3 * m.width}), dy = make({t, 3 * m.width});
    return [=](Exec& ex) { ops::bias_backward(ex, db->view, dy->view); };
  });
}

// Of groups of eight tokens.
void add_group_router(const std::string& name, std::int64_t t) {
  const std::int64_t e = shape().experts, width = shape().width;
  add("mix_tokens/" + name, [=] {
    const Held x = make({t, width}), mix = make({t / 8 * e, width}), part = make({t, e}, DType::kF32),
               row = shuffled({t});
    return [=](Exec& ex) { ops::mix_tokens(ex, mix->view, x->view, part->view, {{row->view, 8, 8}, 0}); };
  });
}

}  // namespace

void add_routers(const std::string& name, std::int64_t tokens) {
  add_router(name, tokens);
  add_router_training(name, tokens);
  add_group_router(name, tokens);
}

}  // namespace upmoe::bench
