#include "parallel/mesh.h"

#include <gtest/gtest.h>

#include <set>

#include "parallel/dry_comm.h"
#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"

namespace upmoe {
namespace {

constexpr Axis kDense[] = {Axis::kPp, Axis::kDp, Axis::kCp, Axis::kTp};
constexpr Axis kSparse[] = {Axis::kPp, Axis::kEdp, Axis::kEp, Axis::kEtp};

std::vector<MeshSpec> possible_meshes(int max_degree, int max_world) {
  std::vector<MeshSpec> all;
  for (int pp = 1; pp <= max_degree; ++pp)
    for (int dp = 1; dp <= max_degree; ++dp)
      for (int cp = 1; cp <= max_degree; ++cp)
        for (int tp = 1; tp <= max_degree; ++tp)
          for (int ep = 1; ep <= dp * cp * tp; ++ep)
            for (int etp = 1; ep * etp <= dp * cp * tp; ++etp) {
              const MeshSpec m{pp, dp, cp, tp, ep, etp};
              if (m.world() <= max_world && m.problems(m.world()).empty()) all.push_back(m);
            }
  return all;
}

TEST(Mesh, CoordinatesOfBothViewsNameEachRankOnce) {
  for (const MeshSpec& m : possible_meshes(3, 24))
    for (const auto& view : {kDense, kSparse}) {
      std::set<std::vector<int>> seen;
      for (int r = 0; r < m.world(); ++r) {
        std::vector<int> at;
        for (int i = 0; i < 4; ++i) {
          at.push_back(m.coord(r, view[i]));
          EXPECT_GE(at.back(), 0);
          EXPECT_LT(at.back(), m.degree(view[i])) << m.str() << " rank " << r << " " << name_of(view[i]);
        }
        EXPECT_TRUE(seen.insert(at).second) << m.str() << " rank " << r;
      }
    }
}

TEST(Mesh, InnermostAxisIsFastest) {
  const MeshSpec m{2, 2, 1, 2, 2, 1};
  EXPECT_EQ(m.edp(), 2);
  EXPECT_EQ(m.coord(1, Axis::kTp), 1);
  EXPECT_EQ(m.coord(2, Axis::kDp), 1);
  EXPECT_EQ(m.coord(4, Axis::kPp), 1);
  EXPECT_EQ(m.coord(1, Axis::kEp), 1);
  EXPECT_EQ(m.coord(2, Axis::kEdp), 1);
  EXPECT_EQ(m.str(), "pp 2, dp 2, cp 1, tp 2, edp 2, ep 2, etp 1");
}

TEST(Mesh, ImpossibleMeshesSayWhy) {
  EXPECT_TRUE((MeshSpec{1, 4, 1, 1, 4, 1}.problems(4).empty()));
  EXPECT_EQ((MeshSpec{1, 4, 1, 1, 4, 1}.problems(8).size()), 1u);   // not all ranks used
  EXPECT_EQ((MeshSpec{1, 4, 1, 1, 3, 1}.problems(4).size()), 1u);   // ep does not divide
  EXPECT_EQ((MeshSpec{0, -1, 1, 1, 1, 1}.problems(4).size()), 2u);  // both are named
  EXPECT_EQ((MeshSpec{1, 4, 1, 1, 3, 1}.problems(8).size()), 2u);
  EXPECT_FALSE((MeshSpec{65536, 65536, 65536, 65536, 1, 1}.problems(1).empty()));  // no wrap-round to 0 ranks
  for (const std::string& p : MeshSpec{1, 4, 1, 1, 3, 1}.problems(8))
    EXPECT_NE(p.find(' '), std::string::npos);
  EXPECT_THROW(ProcessMesh(MeshSpec{1, 2, 1, 1, 1, 1}, *make_self_communicator()), Error);
}

// Every group holds exactly the ranks that differ along its axes alone, in the order of their coordinates.
void check_groups(const ProcessMesh& mesh, Communicator& world) {
  const MeshSpec& m = mesh.spec();
  for (const auto& view : {kDense, kSparse})
    for (int i = 0; i < 4; ++i) {
      if (view[i] == Axis::kEp || view[i] == Axis::kEtp) continue;  // together, below
      Communicator& group = mesh.along(view[i]);
      EXPECT_EQ(group.size(), m.degree(view[i]));
      EXPECT_EQ(group.rank(), mesh.coord(view[i])) << m.str() << " " << name_of(view[i]);
      std::vector<std::int32_t> members(static_cast<std::size_t>(group.size()));
      const std::int32_t me = world.rank();
      group.all_gather(host_view(members.data(), {group.size()}), host_view(&me, {1})).wait();
      for (int k = 0; k < group.size(); ++k) {
        const int other = members[static_cast<std::size_t>(k)];
        EXPECT_EQ(m.coord(other, view[i]), k);
        for (int j = 0; j < 4; ++j)
          if (j != i) {
            EXPECT_EQ(m.coord(other, view[j]), mesh.coord(view[j])) << m.str();
          }
      }
    }
  Communicator& exchange = mesh.along({Axis::kEp, Axis::kEtp});
  EXPECT_EQ(exchange.size(), m.ep * m.etp);
  EXPECT_EQ(exchange.rank(), mesh.coord(Axis::kEp) * m.etp + mesh.coord(Axis::kEtp));
  Communicator& pool = mesh.along({Axis::kCp, Axis::kTp});
  EXPECT_EQ(pool.size(), m.cp * m.tp);
  EXPECT_EQ(pool.rank(), mesh.coord(Axis::kCp) * m.tp + mesh.coord(Axis::kTp));
  EXPECT_THROW(mesh.along({Axis::kTp, Axis::kCp}), Error);
}

TEST(Mesh, GroupsOnThreads) {
  for (const MeshSpec& m : possible_meshes(3, 8))
    run_in_threads(m.world(), [&](Communicator& world) { check_groups(ProcessMesh(m, world), world); });
}

TEST(Mesh, DryMeshHasTheSameGroups) {
  for (const MeshSpec& m : possible_meshes(4, 32))
    for (int r = 0; r < m.world(); ++r) {
      const auto world = make_dry_communicator(r, m.world());
      const ProcessMesh mesh(m, *world);
      for (const auto& view : {kDense, kSparse})
        for (int i = 0; i < 4; ++i) {
          if (view[i] == Axis::kEp || view[i] == Axis::kEtp) continue;
          ASSERT_EQ(mesh.along(view[i]).size(), m.degree(view[i]));
          ASSERT_EQ(mesh.along(view[i]).rank(), m.coord(r, view[i]));
        }
    }
}

}  // namespace
}  // namespace upmoe
