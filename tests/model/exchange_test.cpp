// The exchange of rows by itself, flat and by nodes: tokens have different numbers of experts, some of them none, and
// everything is a small whole number, so that what arrives is exact.

#include "trainer/model/exchange.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "kernels/ops/routing.h"
#include "parallel/mesh.h"
#include "parallel/thread_comm.h"
#include "trainer/rank_model.h"

namespace upmoe {
namespace {

constexpr std::int64_t kTokens = 37, kExperts = 10, kSlots = 3;

// Slot k of token t of the whole group: an expert or, with gaps, -1. Every seventh token has none, the others one to
// three.
std::int32_t expert_of(std::int64_t t, std::int64_t k, bool gaps) {
  if (gaps && (t % 7 == 3 || (t + k) % 4 == 0)) return -1;
  return static_cast<std::int32_t>((t * 5 + k * 3) % kExperts);
}
float weight_of(std::int64_t t, std::int64_t k) {
  return static_cast<float>(1 + (t + 2 * k) % 5);
}

struct Layout {
  int ep, etp, node_ranks;
  bool gaps = true;
};

struct Rank {
  const Layout& layout;
  Communicator& group;
  RankMemory memory{Device{}};
  Arena keep{Device{}, std::size_t{1} << 26, "plan"};
  Exec& ex = memory.exec;
  std::unique_ptr<ProcessMesh> mesh;
  std::unique_ptr<const Exchange> exchange;
  Range tokens = balanced(kTokens, group.size(), group.rank());
  Range experts = balanced(kExperts, layout.ep, group.rank() / layout.etp);
  std::int64_t T = tokens.size();
  std::vector<std::int32_t> index;
  std::vector<float> weight;

  Rank(const Layout& l, Communicator& ranks) : layout(l), group(ranks) {
    NodeGroups nodes;
    if (l.node_ranks > 0) {
      mesh = std::make_unique<ProcessMesh>(MeshSpec{1, l.ep, 1, 1, l.ep, 1}, ranks, l.node_ranks);
      nodes = {mesh->across_nodes(), mesh->inside_node()};
    }
    exchange = make_exchange({kExperts, l.etp}, ranks, nodes);
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t)
      for (std::int64_t k = 0; k < kSlots; ++k) {
        index.push_back(expert_of(t, k, layout.gaps));
        // That of none is not read.
        weight.push_back(expert_of(t, k, layout.gaps) < 0 ? NAN : weight_of(t, k));
      }
  }
  Choices choices() const {
    return {host_view(index.data(), {T, kSlots}), host_view(weight.data(), {T, kSlots}), layout.gaps};
  }

  // (token, weight) of every row of local expert e, whatever their order.
  std::multiset<std::pair<float, float>> expected(std::int64_t e) const {
    std::multiset<std::pair<float, float>> rows;
    for (std::int64_t t = 0; t < kTokens; ++t)
      for (std::int64_t k = 0; k < kSlots; ++k)
        if (expert_of(t, k, layout.gaps) == experts.begin + e)
          rows.emplace(static_cast<float>(t), weight_of(t, k));
    return rows;
  }
  void run();
};

void Rank::run() {
  ExchangePlan plan = exchange->plan(ex, choices(), keep);
  exchange->send_offsets(ex, plan);
  EXPECT_EQ(plan.in_place, group.size() == 1);
  ScratchScope scope(*ex.scratch);
  const auto take = [&](std::int64_t rows, std::int64_t columns) {
    return ex.scratch->take({rows, columns}, DType::kF32, "test");
  };
  const TensorView x_T2 = take(T, 2), y_T2 = take(T, 2);
  for (std::int64_t t = 0; t < T; ++t) {
    x_T2.as<float>()[2 * t] = static_cast<float>(tokens.begin + t);
    x_T2.as<float>()[2 * t + 1] = 1;
    y_T2.as<float>()[2 * t] = y_T2.as<float>()[2 * t + 1] = 0.5f;
  }

  RowsUnderWay x = exchange->set_out(ex, plan, x_T2, keep, layout.gaps ? *ex.scratch : keep),
               weights = exchange->send_weights(ex, plan);
  exchange->read_offsets(ex, plan);
  const std::int64_t R = plan.received();
  const TensorView x_R2 = take(R, 2), weight_R1 = take(R, 1), y_R2 = take(R, 2), dweight_R1 = take(R, 1);
  exchange->receive_weights(ex, weight_R1, weights);
  const ops::PickedRows picked = exchange->receive(ex, plan, x);
  ops::gather_rows(ex, x_R2, picked.from_XD, picked.index_R, picked.divisor);
  ASSERT_EQ(plan.expert_rows().on_host.size(), static_cast<std::size_t>(experts.size() + 1));
  for (std::int64_t e = 0; e < experts.size(); ++e) {
    std::multiset<std::pair<float, float>> rows;
    const auto i = static_cast<std::size_t>(e);
    for (std::int64_t r = plan.expert_rows().on_host[i]; r < plan.expert_rows().on_host[i + 1]; ++r) {
      const float token = x_R2.as<float>()[2 * r], w = weight_R1.as<float>()[r];
      rows.emplace(token, w);
      y_R2.as<float>()[2 * r] = token * w;
      y_R2.as<float>()[2 * r + 1] = 1;
      dweight_R1.as<float>()[r] = static_cast<float>(100 * (experts.begin + e)) + token;
    }
    EXPECT_EQ(rows, expected(e)) << "expert " << experts.begin + e;
  }

  RowsUnderWay y = exchange->send_back(ex, plan, y_R2), dweights = exchange->send_back(ex, plan, dweight_R1);
  exchange->add_back(ex, plan, y_T2, y, {.base_TD = y_T2});
  const TensorView dweight_TK = exchange->weights_back(ex, plan, dweights);
  ASSERT_EQ(dweight_TK.shape, (Shape{T, kSlots}));
  for (std::int64_t t = 0; t < T; ++t) {
    float sum = 0, count = 0;
    const std::int64_t token = tokens.begin + t;
    for (std::int64_t k = 0; k < kSlots; ++k) {
      const std::int32_t e = expert_of(token, k, layout.gaps);
      const std::int64_t value = e < 0 ? 0 : layout.etp * (100 * e + token);  // every piece gives a summand
      EXPECT_EQ(dweight_TK.as<float>()[t * kSlots + k], static_cast<float>(value)) << token << ", " << k;
      if (e < 0) continue;
      sum += static_cast<float>(layout.etp * token) * weight_of(token, k);
      count += static_cast<float>(layout.etp);
    }
    EXPECT_EQ(y_T2.as<float>()[2 * t], 0.5f + sum) << token;
    EXPECT_EQ(y_T2.as<float>()[2 * t + 1], 0.5f + count) << token;
  }
}

TEST(Exchange, EveryChoiceGetsThereAndBack) {
  for (const Layout& layout : {Layout{1, 1, 0},
                               {3, 1, 0},
                               {10, 1, 0},
                               {1, 3, 0},
                               {2, 2, 0},
                               {4, 1, 2},
                               {4, 1, 1},
                               {6, 1, 3},
                               {2, 1, 2},
                               // Ranks without experts, and nodes of them.
                               {12, 1, 0},
                               {12, 2, 0},
                               {12, 1, 4},
                               {20, 1, 1}}) {
    for (const bool gaps : {false, true}) {
      SCOPED_TRACE(fmt::format("ep {}, etp {}, nodes of {}{}", layout.ep, layout.etp, layout.node_ranks,
                               gaps ? ", with gaps" : ""));
      Layout of = layout;
      of.gaps = gaps;
      run_in_threads(of.ep * of.etp, [&](Communicator& group) { Rank(of, group).run(); });
    }
  }
}

}  // namespace
}  // namespace upmoe
