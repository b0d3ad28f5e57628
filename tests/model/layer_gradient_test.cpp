// Every layer's backward against finite differences of its forward; mixtures and their routers: router_gradient_test.

#include <algorithm>
#include <cmath>

#include "tests/support/layer_rig.h"
#include "trainer/model/block.h"
#include "trainer/model/lm_head.h"

namespace upmoe {
namespace {

using test::Rig;

// fp32 forward: rounding / step + step^2 * curvature
constexpr double kStep = 2e-3, kTolerance = 5e-3;

TokenPlaces places_for(std::vector<std::int32_t>& positions, std::vector<std::int32_t>& documents,
                       std::int64_t T, std::int64_t S, bool masked) {
  for (std::int64_t t = 0; t < T; ++t) {
    positions.push_back(static_cast<std::int32_t>(t % S));
    documents.push_back(static_cast<std::int32_t>(t % S / 3));
  }
  TokenPlaces places;
  places.seq_len = S;
  places.positions_T = host_view(positions.data(), {T});
  if (masked) places.document_T = host_view(documents.data(), {T});
  return places;
}

void check_norm(NormKind kind) {
  Rig rig;
  const std::int64_t T = 6, D = 20;
  Norm norm{rig.host.param({D}, 1.0), 1e-6f, kind};
  const TensorView x = rig.host.normal({T, D}, 1.0), probe = rig.host.normal({T, D}, 1.0),
                   dx = rig.host.zeros({T, D});
  Norm::Saved saved;
  const auto scalar = [&] {
    const std::size_t mark = rig.keep.mark();
    const TensorView y = rig.host.zeros({T, D});
    norm.forward(rig.ex, y, {x}, rig.keep, saved);
    rig.keep.rewind(mark);
    return test::dot(y, probe);
  };
  const TensorView y = rig.host.zeros({T, D});
  norm.forward(rig.ex, y, {x}, rig.keep, saved);
  norm.backward(rig.ex, dx, Accumulate::kOverwrite, probe, saved);
  test::expect_gradient(rig.host, "x", x, dx, scalar, kStep, kTolerance);
  test::expect_gradient(rig.host, "weight", norm.weight_D.value, norm.weight_D.grad, scalar, kStep,
                        kTolerance);
}

TEST(LayerGradient, RmsNorm) {
  check_norm(NormKind::kRms);
}
TEST(LayerGradient, RmsNormOfAWeightAddedToOne) {
  check_norm(NormKind::kRmsPlusOne);
}
TEST(LayerGradient, LayerNorm) {
  check_norm(NormKind::kLayerNorm);
}

struct AttentionTraits {
  bool masked = false, head_norms = false;
  std::int64_t window = 0;
  bool limited = false;
};

// A limit that a good part of the values is beyond and none is near: no small step takes one across.
float limit_between(ConstTensorView before_TH) {
  std::vector<float> sizes;
  for (std::int64_t i = 0; i < before_TH.elements(); ++i) sizes.push_back(std::abs(before_TH.as<float>()[i]));
  std::sort(sizes.begin(), sizes.end());
  std::size_t best = sizes.size() * 7 / 10;
  for (std::size_t i = best; i + sizes.size() / 50 < sizes.size(); ++i)
    if (sizes[i + 1] - sizes[i] > sizes[best + 1] - sizes[best]) best = i;
  return (sizes[best] + sizes[best + 1]) / 2;
}

void check_attention(std::int64_t heads, std::int64_t kv_heads, const AttentionTraits& traits) {
  Rig rig;
  const double step = traits.limited ? 5e-4 : kStep;
  const std::int64_t S = 9, T = 2 * S, D = 24, d = 6;
  AttentionLayer layer;
  layer.shape = {heads, kv_heads, d, 0, traits.window};
  layer.rope_theta = 1e4;
  layer.tp = layer.cp = rig.self.get();
  const std::int64_t H = layer.shape.qkv_width();
  layer.qkv = {rig.host.param({H, D}, 0.3), rig.host.param({H}, 0.3)};
  layer.output = {rig.host.param({D, heads * d}, 0.3), std::nullopt};
  if (traits.head_norms)
    layer.head_norms = HeadNorms{rig.host.param({d}, 1.0), rig.host.param({d}, 1.0), 1e-6f};
  std::vector<std::int32_t> positions, documents;
  const TokenPlaces places = places_for(positions, documents, T, S, traits.masked);
  const TensorView x = rig.host.normal({T, D}, 1.0), probe = rig.host.normal({T, D}, 1.0),
                   dx = rig.host.zeros({T, D});
  const auto scalar = [&] {
    AttentionLayer::Saved s;
    const std::size_t mark = rig.keep.mark();
    const TensorView y = rig.host.zeros({T, D});
    layer.forward(rig.ex, y, x, places, rig.keep, s);
    rig.keep.rewind(mark);
    return test::dot(y, probe);
  };
  AttentionLayer::Saved saved;
  const TensorView y = rig.host.zeros({T, D});
  if (traits.limited) {
    layer.clip = 1e9f;
    layer.forward(rig.ex, y, x, places, rig.keep, saved);
    layer.clip = limit_between(saved.before_TH);
  }
  layer.forward(rig.ex, y, x, places, rig.keep, saved);
  layer.backward(rig.ex, dx, probe, saved);
  test::expect_gradient(rig.host, "x", x, dx, scalar, step, kTolerance);
  test::expect_gradient(rig.host, "qkv", layer.qkv.weight_NK.value, layer.qkv.weight_NK.grad, scalar, step,
                        kTolerance);
  test::expect_gradient(rig.host, "qkv bias", layer.qkv.bias_N->value, layer.qkv.bias_N->grad, scalar, step,
                        kTolerance);
  test::expect_gradient(rig.host, "output", layer.output.weight_NK.value, layer.output.weight_NK.grad, scalar,
                        step, kTolerance);
  if (!layer.head_norms) return;
  for (const Param& w_d : {layer.head_norms->q_d, layer.head_norms->k_d})
    test::expect_gradient(rig.host, "norm of heads", w_d.value, w_d.grad, scalar, step, kTolerance);
}

TEST(LayerGradient, Attention) {
  check_attention(4, 4, {});
}
TEST(LayerGradient, AttentionGroupedHeads) {
  check_attention(4, 2, {});
}
TEST(LayerGradient, AttentionDocuments) {
  check_attention(3, 1, {.masked = true});
}
TEST(LayerGradient, AttentionWindow) {
  check_attention(4, 2, {.window = 4});
  check_attention(3, 1, {.masked = true, .window = 2});
}
TEST(LayerGradient, AttentionNormsOfHeads) {
  check_attention(4, 2, {.head_norms = true});
}
TEST(LayerGradient, AttentionOfLimitedQueriesKeysAndValues) {
  check_attention(4, 2, {.limited = true});
  check_attention(4, 2, {.head_norms = true, .limited = true});
}

void check_ffn(bool gated, Activation activation = Activation::kSilu) {
  Rig rig;
  const std::int64_t T = 7, D = 12, F = 10;
  DenseFfn ffn;
  ffn.tp = rig.self.get();
  ffn.activation = activation;
  ffn.gate_up = {rig.host.param({2 * F, D}, 0.4), std::nullopt};
  ffn.down = {rig.host.param({D, F}, 0.4), std::nullopt};
  if (gated) ffn.gate_1D = rig.host.param({1, D}, 0.4);
  const TensorView x = rig.host.normal({T, D}, 1.0), probe = rig.host.normal({T, D}, 1.0),
                   dx = rig.host.zeros({T, D});
  const auto scalar = [&] {
    DenseFfn::Saved s;
    const std::size_t mark = rig.keep.mark();
    const TensorView y = rig.host.zeros({T, D});
    ffn.forward(rig.ex, y, x, rig.keep, s);
    rig.keep.rewind(mark);
    return test::dot(y, probe);
  };
  DenseFfn::Saved saved;
  const TensorView y = rig.host.zeros({T, D});
  ffn.forward(rig.ex, y, x, rig.keep, saved);
  ffn.backward(rig.ex, dx, probe, saved);
  test::expect_gradient(rig.host, "x", x, dx, scalar, kStep, kTolerance);
  test::expect_gradient(rig.host, "gate_up", ffn.gate_up.weight_NK.value, ffn.gate_up.weight_NK.grad, scalar,
                        kStep, kTolerance);
  test::expect_gradient(rig.host, "down", ffn.down.weight_NK.value, ffn.down.weight_NK.grad, scalar, kStep,
                        kTolerance);
  if (gated)
    test::expect_gradient(rig.host, "gate", ffn.gate_1D->value, ffn.gate_1D->grad, scalar, kStep, kTolerance);
}

TEST(LayerGradient, DenseFfn) {
  check_ffn(false);
}
TEST(LayerGradient, DenseFfnOfGelu) {
  check_ffn(false, Activation::kGeluTanh);
}
TEST(LayerGradient, SharedExpert) {
  check_ffn(true);
}

// Cross entropy and divergence together, of tokens of which one has no target.
TEST(LayerGradient, HeadBesideATeacher) {
  Rig rig;
  const std::int64_t T = 6, D = 8, V = 11, taught_width = 5;
  LmHead head, teacher;
  head.weight_VD = rig.host.param({V, D}, 0.5);
  teacher.weight_VD = {rig.host.normal({V, taught_width}, 0.7), {}};
  head.shard = teacher.shard = {0, V};
  head.tp = teacher.tp = rig.self.get();
  const TensorView x = rig.host.normal({T, D}, 1.0), dx = rig.host.zeros({T, D});
  const Distillation rule{0.6, 2};
  const std::vector<std::int32_t> tokens{3, 0, -1, 10, 7, 3};
  const Targets targets{host_view(tokens.data(), {T}),
                        {&teacher, rig.host.normal({T, taught_width}, 1.0), rule}};
  double loss = 0, divergence = 0;
  const auto forward = [&](TensorView gradient_TD) {
    loss = divergence = 0;
    head.forward(rig.ex, {host_view(&loss, {1}), host_view(&divergence, {1})}, x, targets, gradient_TD, 1.0f);
    return (1 - rule.weight) * loss + rule.weight * divergence;
  };
  forward(dx);
  EXPECT_GT(divergence, 0.1);
  const auto scalar = [&] { return forward({}); };
  test::expect_gradient(rig.host, "x", x, dx, scalar, kStep, kTolerance);
  test::expect_gradient(rig.host, "weight", head.weight_VD.value, head.weight_VD.grad, scalar, kStep,
                        kTolerance);
}

}  // namespace
}  // namespace upmoe
