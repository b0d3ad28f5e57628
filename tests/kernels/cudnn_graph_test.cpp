// The graphs that attention asks cuDNN for, shown to cuDNN's own frontend: it can tell without a GPU whether
// their tensors, strides and options are in order.

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "kernels/cuda/library/cudnn_sdpa.h"

namespace upmoe::cuda {
namespace {

TEST(CudnnGraphs, AreInOrderOnEveryTarget) {
  for (const int sm : {80, 90, 100})
    for (const AttentionShape& s :
         {AttentionShape{16, 16, 128, 2048}, AttentionShape{8, 2, 64, 512}, AttentionShape{4, 4, 64, 33},
          AttentionShape{32, 8, 128, 8192, 4096}, AttentionShape{4, 4, 64, 33, 7}})
      for (const bool backward : {false, true})
        EXPECT_EQ(sdpa_refusal(s, 4 * s.seq_len, backward, sm), "")
            << sm << ": " << s.heads << " heads of " << s.head_dim << ", backward " << backward;
}

// Documents of many lengths. On 8.x there is no deterministic backward for them.
TEST(CudnnGraphs, OfDocumentsAreInOrder) {
  for (const int sm : {80, 90, 100})
    for (AttentionShape s : {AttentionShape{16, 16, 128, 2048}, AttentionShape{8, 2, 64, 512},
                             AttentionShape{4, 4, 64, 33}, AttentionShape{32, 8, 128, 2048, 300}})
      for (const bool backward : {false, true}) {
        const auto length = static_cast<std::int32_t>(s.seq_len);
        std::vector<std::int32_t> runs;
        for (std::int32_t b = 0; b < 4; ++b)
          for (const std::int32_t at : {0, 3, length / 16, length / 2}) runs.push_back(b * length + at);
        std::sort(runs.begin(), runs.end());
        runs.erase(std::unique(runs.begin(), runs.end()), runs.end());
        runs.push_back(4 * length);
        s.runs = runs;
        EXPECT_EQ(sdpa_refusal(s, 4 * s.seq_len, backward, sm).empty(), sm != 80 || !backward)
            << sm << ": " << s.heads << " heads of " << s.head_dim << ", backward " << backward;
      }
}

TEST(CudnnGraphs, AreRefusedForGoodReason) {
  EXPECT_NE(sdpa_refusal({16, 16, 129, 2048}, 2048, false, 90), "");
  EXPECT_NE(sdpa_refusal({3, 2, 64, 128}, 128, false, 90), "");
}

}  // namespace
}  // namespace upmoe::cuda
