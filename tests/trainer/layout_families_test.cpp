// The layers of other families under any mesh: norms of heads, windows, weights added to one, scaled embeddings.

#include <gtest/gtest.h>

#include "tests/support/layout_outcomes.h"

namespace upmoe {
namespace {

using test::expect_equal;
using test::Layout;
using test::one_rank;
using test::run_in_layout;

// Every mesh of a few ranks, and tp and cp together on more.
std::vector<Layout> family_meshes() {
  if (test::on_gpu()) return {};
  std::vector<Layout> all;
  for (const char* model : {"llama", "qwen3", "mistral", "gemma"})
    for (const int ranks : {2, 3, 4, 6})
      for (const Layout& l : test::meshes(model, ranks))
        if (ranks < 6 || (l.mesh.cp > 1 && l.mesh.tp > 1)) all.push_back(l);
  return all;
}

class FamilyMeshes : public testing::TestWithParam<Layout> {};

TEST_P(FamilyMeshes, EqualsOneRank) {
  expect_equal(one_rank(GetParam()), run_in_layout(GetParam()));
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FamilyMeshes);
INSTANTIATE_TEST_SUITE_P(Families, FamilyMeshes, testing::ValuesIn(family_meshes()),
                         [](const auto& l) { return l.param.str(); });

// A window and documents, over a ring of keys and values.
TEST(FamilyFeatures, DocumentsWithinAWindow) {
  for (const MeshSpec& mesh :
       {MeshSpec{1, 1, 2, 1, 1, 1}, MeshSpec{1, 1, 3, 2, 1, 1}, MeshSpec{2, 1, 4, 1, 1, 1}}) {
    Layout l{"mistral", mesh, 2};
    l.mask_documents = true;
    expect_equal(one_rank(l), run_in_layout(l));
  }
}

}  // namespace
}  // namespace upmoe
