// A token's logits do not depend on what else is computed with it: the same bits beside other sequences, and
// whatever the other data-parallel ranks compute; in another place, alone or in a larger micro-batch as well,
// where the rows of dense products are independent.

#include <gtest/gtest.h>

#include "configs/run_problems.h"
#include "kernels/cpu/dense_product.h"
#include "parallel/thread_comm.h"
#include "tests/support/layout_run.h"
#include "tests/support/same_batch.h"

namespace upmoe {
namespace {

using test::Golden;
using test::Layout;

using Sequence = std::vector<std::int32_t>;

Sequence random_sequence(std::uint64_t seed, std::int64_t seq_len, std::int64_t vocab) {
  Sequence tokens;
  for (std::int64_t i = 0; i < seq_len; ++i)
    tokens.push_back(static_cast<std::int32_t>(philox(seed, static_cast<std::uint64_t>(i))[0] %
                                               static_cast<std::uint64_t>(vocab)));
  return tokens;
}

// What a data-parallel rank computes at once, and where in it the sequence under test stands.
struct Company {
  std::vector<std::uint64_t> seeds;  // of the sequences
  std::size_t at;
};
constexpr std::uint64_t kProbe = 7;

std::vector<Company> companies_of_one_size() {
  return {{{1, 2, kProbe, 3}, 2},
          {{4, 5, kProbe, 6}, 2},
          {{2, 1, kProbe, 8}, 2},
          {{kProbe, kProbe, kProbe, kProbe}, 2}};
}

std::vector<Company> companies_of_any_size() {
  return {{{kProbe}, 0},
          {{2, kProbe}, 1},
          {{3, 4, kProbe, 5}, 2},
          {{kProbe, 5, 4, 3}, 0},
          {{kProbe, kProbe, kProbe}, 1},
          {{11, 12, 13, 14, 15, kProbe, 16}, 5},
          {{21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, kProbe}, 16}};
}

// This rank's logits of the sequence under test.
std::vector<float> logits_of_probe(Session& s, const ContextShards& context, const Company& company) {
  const std::int64_t S = context.seq_len, n = static_cast<std::int64_t>(company.seeds.size());
  std::vector<std::int32_t> tokens, positions;
  for (const std::uint64_t seed : company.seeds)
    for (const std::int32_t t : random_sequence(seed, S, s.config.vocab_size)) {
      positions.push_back(static_cast<std::int32_t>(static_cast<std::int64_t>(positions.size()) % S));
      tokens.push_back(t);
    }
  std::vector<float> all;  // [this rank's tokens, its share of the vocabulary]
  s.pipeline.evaluate(s.memory.exec, test::batch_of(tokens, tokens, positions, S),
                      [&](std::int64_t, ConstTensorView logits_CV) {
                        all.insert(all.end(), logits_CV.as<float>(),
                                   logits_CV.as<float>() + logits_CV.elements());
                      });
  const std::int64_t chunk = context.chunk_len(),
                     width = static_cast<std::int64_t>(all.size()) / (n * chunk * context.halves());
  std::vector<float> own;
  for (std::int64_t half = 0; half < context.halves(); ++half) {
    const std::int64_t first = half * n * chunk + static_cast<std::int64_t>(company.at) * chunk;
    own.insert(own.end(), all.begin() + first * width, all.begin() + (first + chunk) * width);
  }
  return own;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void expect_same_logits(const Layout& layout, const std::vector<Company>& companies) {
  const Golden golden(layout.model);
  std::mutex mutex;
  run_in_threads(layout.mesh.world(), [&](Communicator& world) {
    const RunConfig run = run_of(layout, golden, "unused");
    ASSERT_TRUE(problems_of(run, golden.config(), world.size()).empty());
    Session s(run, golden.config(), world);
    s.params.load(s.memory.exec, test::golden_weights(golden));
    const ContextShards context{s.mesh.coord(Axis::kCp), layout.mesh.cp, golden.seq_len()};
    const auto dp = static_cast<std::size_t>(s.mesh.coord(Axis::kDp));
    std::vector<float> first;
    for (std::size_t i = 0; i < companies.size(); ++i) {
      // The ranks along dp have different company at the same time.
      const std::size_t mine = (i + dp) % companies.size();
      const std::vector<float> logits = logits_of_probe(s, context, companies[mine]);
      const std::lock_guard lock(mutex);
      if (i == 0) first = logits;
      EXPECT_FALSE(logits.empty());
      EXPECT_TRUE(same_bits(logits, first))
          << "rank " << world.rank() << ": company " << mine << " is not as company " << dp;
    }
  });
}

class BatchMates : public testing::TestWithParam<Layout> {};

TEST_P(BatchMates, OtherSequencesGiveTheSameLogits) {
  expect_same_logits(GetParam(), companies_of_one_size());
}

TEST_P(BatchMates, AnotherPlaceOrSizeGivesTheSameLogits) {
  const DType dtype = dtype_of(GetParam().precision);
  if (!cpu::rows_are_independent(dtype, dtype)) GTEST_SKIP() << "not said of fp32 without AVX-512";
  expect_same_logits(GetParam(), companies_of_any_size());
}

std::vector<Layout> layouts() {
  std::vector<Layout> all;
  for (const Precision precision : {Precision::kFp32, Precision::kBf16})
    for (const MeshSpec& mesh :
         {MeshSpec{}, MeshSpec{1, 2, 1, 1, 2, 1}, MeshSpec{1, 3, 1, 1, 3, 1}, MeshSpec{1, 4, 1, 1, 4, 1},
          MeshSpec{1, 2, 1, 1, 1, 1}, MeshSpec{1, 2, 1, 1, 1, 2}, MeshSpec{1, 1, 1, 2, 1, 1},
          MeshSpec{1, 1, 2, 1, 1, 1}, MeshSpec{1, 1, 1, 2, 1, 2}, MeshSpec{1, 2, 1, 2, 2, 1},
          MeshSpec{1, 1, 2, 2, 2, 2}})
      if (Layout l{"moe_mixed", mesh, 1}; test::is_possible(l, Golden(l.model))) {
        l.precision = precision;
        all.push_back(l);
      }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Meshes, BatchMates, testing::ValuesIn(layouts()),
                         [](const auto& l) { return l.param.str() + "_" + name_of(l.param.precision); });

}  // namespace
}  // namespace upmoe
