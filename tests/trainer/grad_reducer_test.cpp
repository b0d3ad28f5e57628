// What ranks send each other of gradients and weights, against sums of small numbers, which every dtype holds exactly.

#include "trainer/grad_reducer.h"

#include <gtest/gtest.h>

#include <cmath>

#include "parallel/stage_plan.h"
#include "parallel/thread_comm.h"
#include "tests/support/tiny_moe.h"

namespace upmoe {
namespace {

constexpr int kBlocks = 6, kMicroBatches = 3;  // more blocks than lanes

struct Case {
  MeshSpec mesh;
  bool share = false;  // ZeRO-2
  DType dtype = DType::kF32, grad_dtype = DType::kF32;
  std::string str() const {
    return fmt::format("{}, {}, {} and {}", mesh.str(), share ? "shared" : "not shared", name_of(dtype),
                       name_of(grad_dtype));
  }
};

ModelConfig model() {
  ModelConfig c = test::tiny_moe_config();
  c.num_hidden_layers = kBlocks;
  c.vocab_size = 61;
  c.hidden_size = 14;
  c.num_experts = 5;
  return c;
}

StagePlan plan_of(const MeshSpec& mesh) {
  const std::vector<double> costs(kBlocks, 1.0);
  return mesh.pp == 1 ? one_stage(kBlocks) : plan_stages(mesh.pp, 1, costs, 1, 1);
}

double get(const ConstTensorView& t, std::int64_t i) {
  return t.dtype == DType::kF32 ? static_cast<double>(t.as<float>()[i])
                                : static_cast<double>(to_float(t.as<bf16>()[i]));
}
void set(const TensorView& t, std::int64_t i, double x) {
  t.dtype == DType::kF32 ? static_cast<void>(t.as<float>()[i] = static_cast<float>(x))
                         : static_cast<void>(t.as<bf16>()[i] = to_bf16(static_cast<float>(x)));
}

// Nobody writes the gradient of the second norm of a block.
bool is_written(const ParamSpec& p) {
  return p.role != Role::kNorm2;
}
double gradient(int rank, const ParamSpec& p, std::int64_t i, int micro_batch) {
  return static_cast<double>((3 * rank + i + 5 * micro_batch + p.layer + static_cast<int>(p.role)) % 4);
}
double weight(const ParamSpec& p, std::int64_t i) {
  return static_cast<double>((5 * i + 7 * p.layer + static_cast<int>(p.role) + 8) % 97);
}

// Added up in place or, where blocks share their memory, written anew.
void backward(const ParamStore& params, int rank, int layer, int micro_batch) {
  for (const StoredParam& p : params.all()) {
    if (p.spec.layer != layer || !p.grad.given() || !is_written(p.spec)) continue;
    const GradientView g = p.whole().write_grad();
    for (std::int64_t i = 0; i < g.elements(); ++i)
      set(g, i, (g.adds() ? get(g, i) : 0) + gradient(rank, p.spec, i, micro_batch));
  }
}

void expect_sums(const ParamStore& params, const MeshSpec& mesh, int rank, const std::string& where) {
  for (const StoredParam& p : params.all()) {
    if (!p.trains()) continue;
    const std::vector<int> holders = holders_of(p.spec, mesh, rank);
    for (std::int64_t i = p.owned.begin; i < p.owned.end; ++i) {
      double sum = 0;
      for (const int h : holders)
        for (int m = 0; is_written(p.spec) && m < kMicroBatches; ++m) sum += gradient(h, p.spec, i, m);
      ASSERT_EQ(get(p.owned_grad, i - p.owned.begin), sum) << p.spec.name << '[' << i << "], " << where;
    }
  }
}

// What the optimizer would leave: the owned slices, and nothing known of the others.
void update(const ParamStore& params) {
  for (const StoredParam& p : params.all())
    for (std::int64_t i = 0; p.trains() && i < p.value.elements(); ++i)
      set(p.value, i, p.owned.begin <= i && i < p.owned.end ? weight(p.spec, i) : NAN);
}

void expect_weights(const ParamStore& params, int layer, const std::string& where) {
  for (const StoredParam& p : params.all())
    for (std::int64_t i = 0; p.spec.layer == layer && p.trains() && i < p.value.elements(); ++i)
      ASSERT_EQ(get(p.value, i), weight(p.spec, i)) << p.spec.name << '[' << i << "], " << where;
}

ParamStore::Options options_of(const Case& c) {
  ParamStore::Options options;
  options.dtype = c.dtype;
  options.grad_dtype = c.grad_dtype;
  options.fp32 = {Role::kRouter};
  options.share_block_grads = c.share;
  options.freeze = {"layers.1.moe.down_EDF", "norm_D"};
  return options;
}

void poison(const ParamStore& params) {
  for (const StoredParam& p : params.all())
    for (const TensorView& t : {p.grad, p.owned_grad})
      for (std::int64_t i = 0; p.trains() && i < t.elements(); ++i) set(t, i, NAN);
}

// Two steps of one rank, in memory that holds no numbers before the first; the ledger of the second.
Ledger run_rank(const Case& c, Communicator& world) {
  const std::string where = fmt::format("rank {} of {}", world.rank(), c.str());
  const ProcessMesh mesh(c.mesh, world);
  const ParamStore params(model(), c.mesh, plan_of(c.mesh), world.rank(), options_of(c));
  GradReducer reducer(params, mesh, Device{});
  poison(params);
  Ledger ledger;
  Exec ex;
  const std::unique_ptr<Stream> stream = world.make_stream();
  ex.stream = stream.get();
  ex.ledger = &ledger;
  for (int step = 0; step < 2; ++step) {
    ledger.clear();
    params.forget_gradients();
    for (int m = 0; m < kMicroBatches; ++m)
      for (int layer = kBlocks - 1; layer >= kOutsideBlocks; --layer) {
        backward(params, world.rank(), layer, m);
        reducer.ready(ex, layer, m + 1 == kMicroBatches);
      }
    reducer.finish(ex);
    expect_sums(params, c.mesh, world.rank(), where);
    update(params);
    reducer.gather_values(ex);
    for (int layer = kOutsideBlocks; layer < kBlocks; ++layer) {
      reducer.await_values(ex, layer);
      expect_weights(params, layer, where);
    }
    reducer.await_all_values(ex);
  }
  return ledger;
}

std::vector<MeshSpec> meshes() {  // pp, dp, cp, tp, ep, etp
  return {{1, 1, 1, 1, 1, 1}, {1, 3, 1, 1, 1, 1}, {1, 7, 1, 1, 1, 1}, {1, 3, 1, 1, 3, 1}, {1, 2, 1, 2, 2, 1},
          {1, 2, 1, 2, 1, 2}, {1, 1, 2, 2, 4, 1}, {2, 2, 1, 1, 1, 1}, {2, 2, 1, 2, 2, 2}};
}

TEST(GradReducer, OwnersHaveTheSumsAndAllHaveTheWeights) {
  for (const MeshSpec& mesh : meshes())
    for (const bool share : {false, true})
      for (const auto& [dtype, grad_dtype] :
           {std::pair(DType::kF32, DType::kF32), std::pair(DType::kBF16, DType::kF32),
            std::pair(DType::kBF16, DType::kBF16)}) {
        const Case c{mesh, share, dtype, grad_dtype};
        run_in_threads(mesh.world(), [&](Communicator& world) { run_rank(c, world); });
        if (HasFatalFailure()) return;
      }
}

// Of a block its experts and the rest, and what is outside: packed for the owners and taken apart by them, once for
// each reduction, and likewise the weights.
TEST(GradReducer, MovesABucketInOneCall) {
  for (const bool share : {false, true})
    for (const int ranks : {2, 3, 7}) {
      const Case c{{1, ranks, 1, 1, 1, 1}, share};
      run_in_threads(ranks, [&](Communicator& world) {
        const Ledger ledger = run_rank(c, world);
        const int gathers = 2 * kBlocks + 1, reductions = share ? 2 * kBlocks * kMicroBatches + 1 : gathers;
        for (const char* op : {"pack_parts", "unpack_parts"})
          EXPECT_EQ(ledger.entries().at(op).calls, reductions + gathers) << op << ", " << c.str();
        EXPECT_EQ(ledger.entries().at("reduce_scatter").calls, reductions) << c.str();
        EXPECT_FALSE(ledger.entries().contains("cast")) << c.str();
        EXPECT_FALSE(ledger.entries().contains("add")) << c.str();
      });
    }
}

}  // namespace
}  // namespace upmoe
