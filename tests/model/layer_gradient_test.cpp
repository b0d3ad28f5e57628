// Every layer's backward against finite differences of its forward; a mixture's routing is held fixed, which
// is checked: a probe that flips a top-k choice would compare two different functions.

#include "kernels/ops/pointwise.h"
#include "parallel/self_comm.h"
#include "tests/support/gradient_check.h"
#include "trainer/model/block.h"
#include "trainer/model/scaled_router.h"
#include "trainer/model/sigmoid_router.h"
#include "trainer/model/softmax_router.h"
#include "trainer/rank_model.h"

namespace upmoe {
namespace {

using test::Host;

constexpr double kStep = 2e-3, kTolerance = 5e-3;  // fp32 forward: rounding / step + step^2 * curvature

struct Rig {
  RankMemory memory{Device{}};
  Arena keep{Device{}, std::size_t{1} << 30, "activations"};
  std::unique_ptr<Communicator> self = make_self_communicator();
  Host host{7};
  Exec& ex = memory.exec;
};

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
    norm.forward(rig.ex, y, x, rig.keep, saved);
    rig.keep.rewind(mark);
    return test::dot(y, probe);
  };
  const TensorView y = rig.host.zeros({T, D});
  norm.forward(rig.ex, y, x, rig.keep, saved);
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
  float clip = 0;
};
void check_attention(std::int64_t heads, std::int64_t kv_heads, const AttentionTraits& traits) {
  Rig rig;
  const std::int64_t S = 9, T = 2 * S, D = 24, d = 6;
  AttentionLayer layer;
  layer.shape = {heads, kv_heads, d, 0, traits.window};
  layer.rope_theta = 1e4;
  layer.clip = traits.clip;
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
  layer.forward(rig.ex, y, x, places, rig.keep, saved);
  layer.backward(rig.ex, dx, probe, saved);
  test::expect_gradient(rig.host, "x", x, dx, scalar, kStep, kTolerance);
  test::expect_gradient(rig.host, "qkv", layer.qkv.weight_NK.value, layer.qkv.weight_NK.grad, scalar, kStep,
                        kTolerance);
  test::expect_gradient(rig.host, "qkv bias", layer.qkv.bias_N->value, layer.qkv.bias_N->grad, scalar, kStep,
                        kTolerance);
  test::expect_gradient(rig.host, "output", layer.output.weight_NK.value, layer.output.weight_NK.grad, scalar,
                        kStep, kTolerance);
  if (!layer.head_norms) return;
  for (const Param& w_d : {layer.head_norms->q_d, layer.head_norms->k_d})
    test::expect_gradient(rig.host, "norm of heads", w_d.value, w_d.grad, scalar, kStep, kTolerance);
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
  check_attention(4, 2, {.clip = 1.0f});
  check_attention(4, 2, {.head_norms = true, .clip = 0.8f});
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

// The scalar includes the balance and z terms, so that their gradients are tested through the router too.
struct MoeRig : Rig {
  std::int64_t T = 11, D = 12, F = 6, E = 5, K = 2;
  Param router = host.param({E, D}, 0.7);  // well apart, so that small steps flip no choice
  MoeLayer moe;
  TensorView x, probe, sums = keep.take({RouterLoad::size(E)}, DType::kF64, "router load");
  BalanceConfig balance;
  std::vector<std::int32_t> choices;

  explicit MoeRig(bool renormalize, AuxKind kind, double scale = 1) {
    moe.num_experts = E;
    moe.router = make_softmax_router({router}, K, renormalize);
    if (scale != 1) moe.router = make_scaled_router(std::move(moe.router), scale);
    moe.exchange = make_exchange({E, 1}, *self, {});
    moe.experts.gate_up_eGD = host.param({E, 2 * F, D}, 0.4);
    moe.experts.down_eDF = host.param({E, D, F}, 0.4);
    moe.shared.emplace();
    moe.shared->tp = self.get();
    moe.shared->gate_up = {host.param({2 * F, D}, 0.4), std::nullopt};
    moe.shared->down = {host.param({D, F}, 0.4), std::nullopt};
    moe.shared->gate_1D = host.param({1, D}, 0.4);
    x = host.normal({T, D}, 1.0);
    probe = host.normal({T, D}, 1.0);
    balance.terms = {{kind, 3.0}};
    balance.z_coefficient = 0.5;
  }

  BalanceTerms terms() const {
    const LayerLoad load =
        LayerLoad::unpack(T, 0, {sums.as<double>(), static_cast<std::size_t>(sums.elements())});
    LoadPool pool;
    pool.add(load);
    return balance_terms(balance, std::span(&load, 1), pool, true);
  }

  double scalar() {
    MoeLayer::Saved s;
    const std::size_t mark = keep.mark();
    const TensorView y = host.zeros({T, D});
    RouterBalance counted;
    counted.load = {sums};
    moe.forward(ex, y, x, counted, keep, s);
    const std::int32_t* index = s.router.index_TK.as<std::int32_t>();
    EXPECT_TRUE(std::equal(choices.begin(), choices.end(), index)) << "a step flipped a routing choice";
    const BalanceTerms b = terms();
    keep.rewind(mark);
    return test::dot(y, probe) + 3.0 * b.aux.front() + balance.z_coefficient * b.z;
  }
};

void check_moe(MoeRig& rig) {
  MoeLayer::Saved saved;
  const TensorView y = rig.host.zeros({rig.T, rig.D}), dx = rig.host.zeros({rig.T, rig.D});
  RouterBalance balance;
  balance.load = {rig.sums};
  rig.moe.forward(rig.ex, y, rig.x, balance, rig.keep, saved);
  const TensorView& chosen = saved.router.index_TK;
  rig.choices.assign(chosen.as<std::int32_t>(), chosen.as<std::int32_t>() + chosen.elements());
  BalanceTerms terms = rig.terms();
  balance.terms.aux = host_view(terms.aux_gradient[0].data(), {rig.E});
  balance.terms.z_scale = terms.z_scale[0];
  rig.moe.backward(rig.ex, dx, rig.probe, balance, saved);
  const auto scalar = [&] { return rig.scalar(); };
  const double step = 5e-4;  // smaller than elsewhere: no flips
  test::expect_gradient(rig.host, "x", rig.x, dx, scalar, step, 1e-2);
  test::expect_gradient(rig.host, "router", rig.router.value, rig.router.grad, scalar, step, 1e-2);
  test::expect_gradient(rig.host, "experts in", rig.moe.experts.gate_up_eGD.value,
                        rig.moe.experts.gate_up_eGD.grad, scalar, kStep, 1e-2);
  test::expect_gradient(rig.host, "experts out", rig.moe.experts.down_eDF.value,
                        rig.moe.experts.down_eDF.grad, scalar, kStep, 1e-2);
  test::expect_gradient(rig.host, "shared gate", rig.moe.shared->gate_1D->value,
                        rig.moe.shared->gate_1D->grad, scalar, kStep, 1e-2);
}

// bf16 rows beside an fp32 weight: what the fp32 router makes of the same values, only its input gradient rounded.
TEST(LayerGradient, RouterWiderThanItsRows) {
  MoeRig rig(true, AuxKind::kHf);
  Host& host = rig.host;
  const TensorView x = host.normal({rig.T, rig.D}, 1.0), before = host.normal({rig.T, rig.D}, 1e-3),
                   dweight_TK = host.normal({rig.T, rig.K}, 1.0);
  const auto narrow = [&](TensorView wide) {
    TensorView rows = host.zeros(wide.shape);
    rows.dtype = DType::kBF16;
    ops::cast(rig.ex, rows, wide);
    ops::cast(rig.ex, wide, rows);  // the same values
    return rows;
  };
  const TensorView x_bf16 = narrow(x), dx_bf16 = narrow(before);
  const TensorView grad = rig.router.grad, wide_grad = host.zeros(grad.shape);
  RouterBalance balance;
  balance.terms.aux = host.normal({rig.E}, 1.0);
  Router::Saved mixed, wide;
  rig.moe.router->forward(rig.ex, x_bf16, balance, rig.keep, mixed);
  rig.moe.router->forward(rig.ex, x, balance, rig.keep, wide);
  rig.moe.router->backward(rig.ex, before, dweight_TK, balance, wide);
  ops::cast(rig.ex, wide_grad, grad);
  ops::fill(rig.ex, grad, 0.0f);
  rig.moe.router->backward(rig.ex, dx_bf16, dweight_TK, balance, mixed);
  const auto values = [](ConstTensorView t) {
    return std::vector(t.as<float>(), t.as<float>() + t.elements());
  };
  EXPECT_EQ(values(mixed.probs_TE), values(wide.probs_TE));
  EXPECT_EQ(values(mixed.weight_TK), values(wide.weight_TK));
  EXPECT_EQ(values(grad), values(wide_grad));
  for (std::int64_t i = 0; i < before.elements(); ++i)
    EXPECT_EQ(dx_bf16.as<bf16>()[i].bits, to_bf16(before.as<float>()[i]).bits) << i;
}

TEST(LayerGradient, MoePooledBalance) {
  MoeRig rig(false, AuxKind::kHf);
  check_moe(rig);
}
TEST(LayerGradient, MoeRenormalised) {
  MoeRig rig(true, AuxKind::kHf);
  check_moe(rig);
}
TEST(LayerGradient, MoeOfScaledWeights) {
  for (const bool renormalize : {false, true}) {
    MoeRig rig(renormalize, AuxKind::kHf, 2.5);
    check_moe(rig);
  }
}
TEST(LayerGradient, AFactorIsOnTheChosenWeightsAlone) {
  MoeRig plain(true, AuxKind::kHf), scaled(true, AuxKind::kHf, 2.5);
  Router::Saved before, after;
  const Choices one = plain.moe.router->forward(plain.ex, plain.x, {}, plain.keep, before),
                other = scaled.moe.router->forward(scaled.ex, scaled.x, {}, scaled.keep, after);
  for (std::int64_t i = 0; i < one.weight_TK.elements(); ++i) {
    EXPECT_EQ(other.index_TK.as<std::int32_t>()[i], one.index_TK.as<std::int32_t>()[i]);
    EXPECT_EQ(other.weight_TK.as<float>()[i], 2.5f * one.weight_TK.as<float>()[i]);
    EXPECT_EQ(after.weight_TK.as<float>()[i], one.weight_TK.as<float>()[i]) << "the router's own";
  }
}
TEST(LayerGradient, MoeSwitchBalance) {
  MoeRig rig(false, AuxKind::kSwitch);
  check_moe(rig);
}
TEST(LayerGradient, MoeSigmoidScores) {
  for (const bool renormalize : {false, true}) {
    MoeRig rig(renormalize, AuxKind::kHf);
    const TensorView bias_E = rig.host.normal({rig.E}, 0.2);
    rig.moe.router =
        make_sigmoid_router({rig.router}, bias_E, rig.K, {.renormalize = renormalize, .scale = 2.5f});
    check_moe(rig);
  }
}

}  // namespace
}  // namespace upmoe
