// Who owns what, over thousands of random meshes: each element of each parameter has exactly one owner.

#include "parallel/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "kernels/core/philox.h"
#include "parallel/stage_plan.h"

namespace upmoe {
namespace {

class Dice {
 public:
  explicit Dice(std::uint64_t seed) : seed_(seed) {}
  int roll(int from, int to) {
    return from + static_cast<int>(philox(seed_, next_++)[0] % static_cast<std::uint32_t>(to - from + 1));
  }

 private:
  std::uint64_t seed_, next_ = 0;
};

ModelConfig random_model(Dice& dice) {
  ModelConfig c;
  c.vocab_size = dice.roll(1, 23);
  c.num_key_value_heads = dice.roll(1, 3);
  c.num_attention_heads = c.num_key_value_heads * dice.roll(1, 3);
  c.head_dim = 2 * dice.roll(1, 2);
  c.hidden_size = dice.roll(1, 9);
  c.intermediate_size = dice.roll(1, 9);
  c.num_hidden_layers = dice.roll(1, 4);
  c.tie_word_embeddings = dice.roll(0, 1) == 1;
  if (dice.roll(0, 3) > 0) {
    c.model_type = "qwen2_moe";
    c.num_experts = dice.roll(1, 9);
    c.num_experts_per_tok = 1;
    c.moe_intermediate_size = dice.roll(1, 6);
    c.shared_expert_intermediate_size = dice.roll(0, 4);
    c.decoder_sparse_step = dice.roll(1, 2);
  }
  if (dice.roll(0, 3) == 0) {
    c.lora.rank = dice.roll(1, 3);
    c.lora.targets = {LoraTarget::kQuery, LoraTarget::kValue, LoraTarget::kOutput, LoraTarget::kUp,
                      LoraTarget::kDown};
  }
  return c;
}

MeshSpec random_mesh(Dice& dice) {
  MeshSpec m{dice.roll(1, 3), dice.roll(1, 4), dice.roll(1, 3), dice.roll(1, 4), 1, 1};
  std::vector<std::pair<int, int>> possible;
  const int stage = m.dp * m.cp * m.tp;
  for (int ep = 1; ep <= stage; ++ep)
    for (int etp = 1; ep * etp <= stage; ++etp)
      if (stage % (ep * etp) == 0) possible.emplace_back(ep, etp);
  std::tie(m.ep, m.etp) =
      possible[static_cast<std::size_t>(dice.roll(0, static_cast<int>(possible.size()) - 1))];
  return m;
}

std::vector<std::int64_t> flat_indices(const Shape& global, const Box& box) {
  std::vector<std::int64_t> flat;
  for (std::int64_t i = 0; i < box.elements(); ++i) {
    std::int64_t rest = i, at = 0, stride = 1;
    for (int d = box.extent.rank - 1; d >= 0; --d) {
      at += (box.offset[d] + rest % box.extent[d]) * stride;
      rest /= box.extent[d];
      stride *= global[d];
    }
    flat.push_back(at);
  }
  return flat;
}

// Every stage one to three runs of blocks, of random cost.
StagePlan random_stages(Dice& dice, const ModelConfig& config, MeshSpec& mesh) {
  mesh.pp = std::min(mesh.pp, config.num_hidden_layers);
  const int chunks = mesh.pp == 1 ? 1 : dice.roll(1, config.num_hidden_layers / mesh.pp);
  std::vector<double> costs;
  for (int i = 0; i < config.num_hidden_layers; ++i) costs.push_back(dice.roll(1, 5));
  return plan_stages(mesh.pp, chunks, costs, dice.roll(0, 5), dice.roll(0, 5));
}

void check_ownership(const ModelConfig& config, const MeshSpec& mesh, const StagePlan& plan) {
  for (const ParamSpec& p : make_param_table(config)) {
    std::vector<int> owners(static_cast<std::size_t>(p.shape.elements()));
    std::map<std::vector<std::int64_t>, std::vector<int>> replicas;  // the shard -> replica indices seen
    for (int rank = 0; rank < mesh.world(); ++rank) {
      const Box shard = shard_of(p, mesh, rank, plan);
      if (shard.elements() == 0) continue;
      ASSERT_TRUE(contains(whole(p.shape), shard)) << p.name << " " << mesh.str();
      const Replica r = replica_of(p, mesh, rank);
      ASSERT_TRUE(0 <= r.index && r.index < r.count) << p.name << " " << mesh.str();
      std::vector<std::int64_t> key;
      for (int d = 0; d < p.shape.rank; ++d) key.insert(key.end(), {shard.offset[d], shard.extent[d]});
      replicas[key].push_back(r.index);
      const std::vector<std::int64_t> of_shard = flat_indices(p.shape, shard);
      const Range mine = owner_slice(shard.elements(), r);
      for (std::int64_t i = mine.begin; i < mine.end; ++i)
        ++owners[static_cast<std::size_t>(of_shard[static_cast<std::size_t>(i)])];
      const std::vector<Box> boxes = flat_range_to_boxes(shard, mine);
      std::vector<std::int64_t> of_boxes;
      for (const Box& b : boxes)
        for (const std::int64_t i : flat_indices(p.shape, b)) of_boxes.push_back(i);
      ASSERT_TRUE(std::equal(of_boxes.begin(), of_boxes.end(), of_shard.begin() + mine.begin,
                             of_shard.begin() + mine.end))
          << p.name << " " << mesh.str();
    }
    ASSERT_TRUE(std::all_of(owners.begin(), owners.end(), [](int n) { return n == 1; }))
        << p.name << " " << mesh.str();
    for (auto& [key, indices] : replicas) {  // whoever holds the same shard is numbered 0, 1, 2, ...
      std::sort(indices.begin(), indices.end());
      for (std::size_t i = 0; i < indices.size(); ++i)
        ASSERT_EQ(indices[i], static_cast<int>(i)) << p.name << " " << mesh.str();
    }
  }
}

TEST(Layout, EveryElementHasOneOwnerOnAnyMesh) {
  for (std::uint64_t seed = 0; seed < 2500; ++seed) {
    Dice dice(seed);
    const ModelConfig model = random_model(dice);
    MeshSpec mesh = random_mesh(dice);
    const StagePlan plan = random_stages(dice, model, mesh);
    check_ownership(model, mesh, plan);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

// The replicas of a shard are the group that sums its gradients: dp x cp for dense parameters, edp for
// experts, and along tp as well what tp does not split.
TEST(Layout, ReplicasShareTheirShard) {
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    Dice dice(seed + 10'000);
    const ModelConfig model = random_model(dice);
    MeshSpec mesh = random_mesh(dice);
    const StagePlan plan = random_stages(dice, model, mesh);
    for (const ParamSpec& p : make_param_table(model)) {
      std::map<std::vector<std::int64_t>, int> holders;
      const auto key_of = [&](int rank) {
        const Box b = shard_of(p, mesh, rank, plan);
        std::vector<std::int64_t> key;
        for (int d = 0; d < p.shape.rank; ++d) key.insert(key.end(), {b.offset[d], b.extent[d]});
        return key;
      };
      for (int rank = 0; rank < mesh.world(); ++rank) ++holders[key_of(rank)];
      for (int rank = 0; rank < mesh.world(); ++rank)
        if (shard_of(p, mesh, rank, plan).elements() > 0) {
          const Replica r = replica_of(p, mesh, rank);
          ASSERT_EQ(r.count, holders[key_of(rank)]) << p.name << " " << mesh.str();
          const std::vector<int> group = holders_of(p, mesh, rank);
          ASSERT_EQ(static_cast<int>(group.size()), r.count) << p.name << " " << mesh.str();
          ASSERT_EQ(group[static_cast<std::size_t>(r.index)], rank) << p.name << " " << mesh.str();
          for (const int other : group) ASSERT_EQ(key_of(other), key_of(rank)) << p.name << " " << mesh.str();
        }
    }
  }
}

TEST(Layout, FlatRangesAndBoxesRoundTrip) {
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    Dice dice(seed);
    Shape global;
    Box box;
    global.rank = box.offset.rank = box.extent.rank = dice.roll(0, 4);
    for (std::size_t d = 0; d < static_cast<std::size_t>(global.rank); ++d) {
      box.extent.dim[d] = dice.roll(1, 5);
      box.offset.dim[d] = dice.roll(0, 3);
      global.dim[d] = box.offset.dim[d] + box.extent.dim[d] + dice.roll(0, 2);
    }
    const int n = static_cast<int>(box.elements());
    const int begin = dice.roll(0, n), end = dice.roll(begin, n);
    const std::vector<Box> boxes = flat_range_to_boxes(box, {begin, end});
    ASSERT_LE(static_cast<int>(boxes.size()), std::max(1, 2 * global.rank - 1))
        << box.extent.str() << " " << begin << ".." << end;
    std::vector<std::int64_t> found;
    for (const Box& b : boxes) {
      ASSERT_TRUE(contains(box, b));
      ASSERT_GT(b.elements(), 0);
      for (const std::int64_t i : flat_indices(global, b)) found.push_back(i);
    }
    const std::vector<std::int64_t> all = flat_indices(global, box);
    ASSERT_TRUE(std::equal(found.begin(), found.end(), all.begin() + begin, all.begin() + end))
        << box.extent.str() << " " << begin;
  }
  EXPECT_THROW(flat_range_to_boxes(whole(Shape{4}), {0, 5}), Error);
  EXPECT_THROW(flat_range_to_boxes(whole(Shape{4}), {-1, 2}), Error);
  EXPECT_THROW(flat_range_to_boxes(whole(Shape{4}), {3, 2}), Error);
  EXPECT_TRUE(flat_range_to_boxes(whole(Shape{0, 4}), {0, 0}).empty());
}

TEST(Layout, SixtyExpertsOverEightRanks) {
  std::int64_t at = 0;
  for (int r = 0; r < 8; ++r) {
    const Range experts = balanced(60, 8, r);
    EXPECT_TRUE(experts.size() == 7 || experts.size() == 8);
    EXPECT_EQ(experts.begin, at);
    at = experts.end;
  }
  EXPECT_EQ(at, 60);
  const std::int64_t big = std::int64_t{1} << 61;  // no overflow in n * index
  EXPECT_EQ(balanced(big, 4096, 4095).end, big);
  EXPECT_EQ(balanced(big, 4096, 1), (Range{big / 4096, big / 2048}));
  EXPECT_THROW(balanced(1, 0, 0), Error);
  EXPECT_THROW(balanced(1, 2, 2), Error);
  EXPECT_THROW(balanced(-1, 2, 0), Error);
}

// Two key/value heads on eight tp ranks: four hold each head whole, and share the ownership of it.
TEST(Layout, KeyValueHeadsAreReplicatedWhereTheyAreFewerThanRanks) {
  ParamSpec k;
  k.name = "layers.0.attn.k_NHD";
  k.shape = {2, 4, 16};
  k.dims = {Dim::kKvHeads, Dim::kHeadSize, Dim::kEmbed, Dim::kOne};
  k.layer = 0;
  const MeshSpec mesh{1, 2, 1, 8, 1, 1};
  for (int rank = 0; rank < mesh.world(); ++rank) {
    const Box shard = shard_of(k, mesh, rank, one_stage(1));
    EXPECT_EQ(shard.offset[0], mesh.coord(rank, Axis::kTp) / 4);
    EXPECT_EQ(shard.extent, (Shape{1, 4, 16}));
    EXPECT_EQ(replica_of(k, mesh, rank).count, 8);  // 4 along tp x 2 along dp
  }
}

TEST(Layout, Boxes) {
  const Box a{{1, 2}, {3, 4}}, b{{2, 0}, {5, 3}};
  EXPECT_EQ(intersect(a, b), (Box{{2, 2}, {2, 1}}));
  EXPECT_EQ(intersect(a, Box{{9, 9}, {1, 1}}).elements(), 0);
  EXPECT_TRUE(contains(a, intersect(a, b)));
  EXPECT_FALSE(contains(a, b));
  EXPECT_FALSE(contains(whole(Shape{4}), whole(Shape{4, 1})));
  EXPECT_THROW(intersect(whole(Shape{4}), whole(Shape{4, 1})), Error);
}

}  // namespace
}  // namespace upmoe
