// Single ops at the shapes of a training step, as a share of the machine's peak measured in the same run: of
// the best large matrix product for products, of a memory copy for the others.
//
//   OMP_NUM_THREADS=2 bench_ops --benchmark_filter=grouped
//
// Counters: gflops and gbytes per second, and share_of_peak. Sizes: tiny is 2048 tokens, width 256, 60
// experts of 176, top-4; mid the same with width 1024 and experts of 704.
#include "kernels/core/exec.h"
#include "kernels/ops/activation.h"
#include "kernels/ops/adamw.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/layer_norm.h"
#include "kernels/ops/noisy_routing.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pack.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/router_draws.h"
#include "kernels/ops/sigmoid_routing.h"
#include "kernels/ops/token_groups.h"
#include "tests/bench/op_bench.h"

namespace upmoe::bench {
namespace {

// Rows per expert as an untrained router gives them: every row picks its expert at random.
std::vector<std::int32_t> random_offsets() {
  std::minstd_rand random(3);
  std::vector<std::int32_t> offsets(kExperts + 1);
  for (std::int64_t r = 0; r < kTokens * kTopK; ++r) ++offsets[random() % kExperts + 1];
  for (std::size_t i = 0; i < kExperts; ++i) offsets[i + 1] += offsets[i];
  return offsets;
}

// One Linear of all experts, [N, K] each.
void add_grouped(const std::string& name, std::int64_t n, std::int64_t k, DType dtype) {
  const std::int64_t rows = kTokens * kTopK;
  add("grouped_gemm_forward/" + name, dtype, [=](benchmark::State& state) {
    const Tensor x({rows, k}, dtype), w({kExperts, n, k}, dtype), y({rows, n}, dtype);
    const auto offsets = random_offsets();
    const ExpertRows rows_e{host_view(offsets.data(), {kExperts + 1}), {}};
    measure(state, dtype, [&](Exec& ex) { ops::grouped_gemm_forward(ex, y.view, x.view, w.view, rows_e); });
  });
  add("grouped_gemm_dgrad/" + name, dtype, [=](benchmark::State& state) {
    const Tensor dx({rows, k}, dtype), w({kExperts, n, k}, dtype), dy({rows, n}, dtype);
    const auto offsets = random_offsets();
    const ExpertRows rows_e{host_view(offsets.data(), {kExperts + 1}), {}};
    measure(state, dtype, [&](Exec& ex) { ops::grouped_gemm_dgrad(ex, dx.view, dy.view, w.view, rows_e); });
  });
  // The first of a step overwrites.
  for (const Accumulate mode : {Accumulate::kAdd, Accumulate::kOverwrite}) {
    const std::string op = mode == Accumulate::kAdd ? "grouped_gemm_wgrad/" : "grouped_gemm_wgrad_first/";
    add(op + name, dtype, [=](benchmark::State& state) {
      const Tensor x({rows, k}, dtype), dw({kExperts, n, k}, dtype), dy({rows, n}, dtype);
      const auto offsets = random_offsets();
      const ExpertRows rows_e{host_view(offsets.data(), {kExperts + 1}), {}};
      measure(state, dtype,
              [&](Exec& ex) { ops::grouped_gemm_wgrad(ex, dw.view, dy.view, x.view, rows_e, mode); });
    });
  }
}

// A Linear weight [N, K] over all tokens: forward, gradient of the input, gradient of the weight.
void add_linear(const std::string& name, std::int64_t n, std::int64_t k, DType dtype) {
  const auto no = Transpose::kNo, yes = Transpose::kYes;
  add("gemm_forward/" + name, dtype, [=](benchmark::State& state) {
    const Tensor x({kTokens, k}, dtype), w({n, k}, dtype), y({kTokens, n}, dtype);
    measure(state, dtype, [&](Exec& ex) {
      ops::gemm(ex, y.view, {x.view, no}, {w.view, yes}, Accumulate::kOverwrite);
    });
  });
  add("gemm_dgrad/" + name, dtype, [=](benchmark::State& state) {
    const Tensor dx({kTokens, k}, dtype), w({n, k}, dtype), dy({kTokens, n}, dtype);
    measure(state, dtype, [&](Exec& ex) {
      ops::gemm(ex, dx.view, {dy.view, no}, {w.view, no}, Accumulate::kOverwrite);
    });
  });
  add("gemm_wgrad/" + name, dtype, [=](benchmark::State& state) {
    const Tensor x({kTokens, k}, dtype), dw({n, k}, dtype), dy({kTokens, n}, dtype);
    measure(state, dtype, [&](Exec& ex) {
      ops::gemm(ex, dw.view, {dy.view, yes}, {x.view, no}, Accumulate::kAdd);
    });
  });
}

void add_rows(const Model& model, DType dtype) {
  const std::int64_t width = model.width, vocab = model.vocab;
  const auto random_tokens = [=] {
    Tensor tokens({kTokens}, DType::kI32);
    std::minstd_rand random(5);
    for (std::int64_t t = 0; t < kTokens; ++t)
      tokens.view.as<std::int32_t>()[t] = static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab));
    return tokens;
  };
  add(std::string("embedding_forward/") + model.name, dtype, [=](benchmark::State& state) {
    const Tensor tokens = random_tokens(), w({vocab, width}, dtype), x({kTokens, width}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::embedding_forward(ex, x.view, tokens.view, w.view); });
  });
  add(std::string("embedding_backward/") + model.name, dtype, [=](benchmark::State& state) {
    const Tensor tokens = random_tokens(), dw({vocab, width}, dtype), dx({kTokens, width}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::embedding_backward(ex, dw.view, dx.view, tokens.view); });
  });
  add(std::string("bias_backward/") + model.name, dtype, [=](benchmark::State& state) {
    const Tensor db({3 * width}, dtype), dy({kTokens, 3 * width}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::bias_backward(ex, db.view, dy.view); });
  });
}

// What stands between products: norms of heads, gates.
void add_heads(const Model& model, DType dtype) {
  const std::string name = std::string("/") + model.name;
  const AttentionShape all{model.width / 64, model.width / 64, 64, kTokens / 2};
  const std::int64_t width = model.width, ffn = kTopK * model.expert_width;
  add("rope_backward" + name, dtype, [=](benchmark::State& state) {
    const Tensor dqkv({kTokens, 3 * width}, dtype), db({3 * width}, dtype), positions({kTokens}, DType::kI32);
    std::iota(positions.view.as<std::int32_t>(), positions.view.as<std::int32_t>() + kTokens, 0);
    measure(state, dtype,
            [&](Exec& ex) { ops::rope_backward(ex, dqkv.view, db.view, positions.view, all, 1e6); });
  });
  add("qk_norm_forward" + name, dtype, [=](benchmark::State& state) {
    const Tensor qkv({kTokens, 3 * width}, dtype), x({kTokens, 2 * width}, dtype), w({64}, dtype);
    const Tensor rstd({kTokens, 2 * all.heads}, DType::kF32);
    measure(state, dtype, [&](Exec& ex) {
      ops::qk_norm_forward(ex, qkv.view, x.view, rstd.view, {w.view, w.view, 1e-6f}, all);
    });
  });
  add("qk_norm_backward" + name, dtype, [=](benchmark::State& state) {
    const Tensor dqkv({kTokens, 3 * width}, dtype), x({kTokens, 2 * width}, dtype), w({64}, dtype),
        dw({64}, dtype);
    const Tensor rstd({kTokens, 2 * all.heads}, DType::kF32);
    measure(state, dtype, [&](Exec& ex) {
      ops::qk_norm_backward(ex, dqkv.view, {dw.view, dw.view}, x.view, rstd.view, {w.view, w.view, 1e-6f},
                            all);
    });
  });
  add("layer_norm_forward" + name, dtype, [=](benchmark::State& state) {
    const Tensor y({kTokens, width}, dtype), x({kTokens, width}, dtype), w({width}, dtype);
    const Tensor mean({kTokens}, DType::kF32), rstd({kTokens}, DType::kF32);
    measure(state, dtype, [&](Exec& ex) {
      ops::layer_norm_forward(ex, y.view, {mean.view, rstd.view}, x.view, w.view, 1e-5f);
    });
  });
  add("layer_norm_backward" + name, dtype, [=](benchmark::State& state) {
    const Tensor dx({kTokens, width}, dtype), dw({width}, dtype), x({kTokens, width}, dtype),
        w({width}, dtype);
    const Tensor mean({kTokens}, DType::kF32), rstd({kTokens}, DType::kF32);
    measure(state, dtype, [&](Exec& ex) {
      ops::layer_norm_backward(ex, dx.view, dw.view, dx.view, {x.view, mean.view, rstd.view}, w.view,
                               Accumulate::kOverwrite);
    });
  });
  add("clip" + name, dtype, [=](benchmark::State& state) {
    const Tensor out({kTokens, 3 * width}, dtype), in({kTokens, 3 * width}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::clip(ex, out.view, in.view, 8.0f); });
  });
  add("geglu_forward" + name, dtype, [=](benchmark::State& state) {
    const Tensor h({kTokens, ffn}, dtype), gate_up({kTokens, 2 * ffn}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::geglu_forward(ex, h.view, gate_up.view); });
  });
  add("geglu_backward" + name, dtype, [=](benchmark::State& state) {
    const Tensor d({kTokens, 2 * ffn}, dtype), dh({kTokens, ffn}, dtype), gate_up({kTokens, 2 * ffn}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::geglu_backward(ex, d.view, {}, dh.view, gate_up.view); });
  });
  add("clip_backward" + name, dtype, [=](benchmark::State& state) {
    const Tensor dx({kTokens, 3 * width}, dtype), in({kTokens, 3 * width}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::clip_backward(ex, dx.view, in.view, 0.5f); });
  });
}

void add_attention(const Model& model, DType dtype) {
  const std::int64_t width = model.width;
  for (const std::int64_t window : {std::int64_t{0}, kTokens / 16}) {
    const AttentionShape s{width / 64, width / 64, 64, kTokens / 2, window};
    const std::string name = std::string(window > 0 ? "_window/" : "/") + model.name;
    add("attention_forward" + name, dtype, [=](benchmark::State& state) {
      const Tensor qkv({kTokens, 3 * width}, dtype), out({kTokens, width}, dtype);
      const Tensor lse({kTokens, s.heads}, DType::kF32);
      measure(state, dtype, [&](Exec& ex) { ops::attention_forward(ex, out.view, lse.view, qkv.view, s); });
    });
    add("attention_backward" + name, dtype, [=](benchmark::State& state) {
      const Tensor dqkv({kTokens, 3 * width}, dtype), qkv({kTokens, 3 * width}, dtype),
          out({kTokens, width}, dtype), dout({kTokens, width}, dtype), lse({kTokens, s.heads}, DType::kF32);
      measure(state, dtype, [&](Exec& ex) {
        ops::attention_backward(ex, dqkv.view, dout.view, qkv.view, {out.view, lse.view}, s);
      });
    });
  }
}

// Over the parameters of one layer's experts.
void add_elementwise(const Model& model, DType dtype) {
  const std::int64_t n = kExperts * 3 * model.expert_width * model.width;
  const std::string name = std::string("/") + model.name;
  add("adamw" + name, dtype, [=](benchmark::State& state) {
    const Tensor weight({n}, dtype), grad({n}, dtype), master({n}, DType::kF32), m({n}, DType::kF32);
    const Tensor v({n}, DType::kF32);
    ops::fill(exec(), v.view, 0.5f);  // squares are not negative
    measure(state, dtype, [&](Exec& ex) {
      ops::adamw(ex, weight.view, master.view, m.view, v.view, grad.view, AdamWStep{.lr = 1e-4f});
    });
  });
  add("add" + name, dtype, [=](benchmark::State& state) {
    const Tensor a({n}, dtype), b({n}, dtype), out({n}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::add(ex, out.view, a.view, b.view); });
  });
  add("pack_parts" + name, dtype, [=](benchmark::State& state) {
    const Tensor gate_up({n / 3 * 2}, dtype), down({n / 3}, dtype);
    const PackedParts packing({gate_up.view.elements(), down.view.elements()}, 64);
    const Tensor packed({packing.parts(), packing.slice()}, dtype);
    const std::vector<ConstTensorView> tensors{gate_up.view, down.view};
    measure(state, dtype, [&](Exec& ex) { ops::pack_parts(ex, packed.view, tensors, packing); });
  });
  add("cast_from_fp32" + name, dtype, [=](benchmark::State& state) {
    const Tensor in({n}, DType::kF32), out({n}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::cast(ex, out.view, in.view); });
  });
  add("fill" + name, dtype, [=](benchmark::State& state) {
    const Tensor x({n}, dtype);
    measure(state, dtype, [&](Exec& ex) { ops::fill(ex, x.view, 0.0f); });
  });
  add("sum_of_squares" + name, dtype, [=](benchmark::State& state) {
    const Tensor x({n}, dtype), sum({1}, DType::kF64);
    measure(state, dtype, [&](Exec& ex) { ops::sum_of_squares(ex, sum.view, ops::only(x.view)); });
  });
}

void add_all() {
  add_decode();
  add_dense();
  add_routers();
  add_routed();
  add_group_routers();
  for (const Model& model : kModels)
    for (DType dtype : kFloats) {
      const std::string name = model.name;
      add_grouped(name + "/gate_up", 2 * model.expert_width, model.width, dtype);
      add_grouped(name + "/down", model.width, model.expert_width, dtype);
      add_linear(name + "/qkv", 3 * model.width, model.width, dtype);
      add_linear(name + "/shared_gate_up", 2 * kTopK * model.expert_width, model.width, dtype);
      add_linear(name + "/shared_down", model.width, kTopK * model.expert_width, dtype);
      add_linear(name + "/head", model.vocab, model.width, dtype);
      add_rows(model, dtype);
      add_heads(model, dtype);
      add_attention(model, dtype);
      add_elementwise(model, dtype);
    }
}

}  // namespace
}  // namespace upmoe::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  upmoe::bench::add_all();
  std::printf("peak: %.0f GFLOP/s fp32, %.0f bf16, %.1f GB/s\n",
              upmoe::bench::peak_flops(upmoe::DType::kF32) * 1e-9,
              upmoe::bench::peak_flops(upmoe::DType::kBF16) * 1e-9, upmoe::bench::peak_bytes() * 1e-9);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
