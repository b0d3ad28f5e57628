// Attention through (pretended) cuDNN: layouts, plans, and what happens when it refuses.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>

#include "kernels/cuda/library/cudnn_sdpa.h"
#include "kernels/cuda/library/sdpa_slices.h"
#include "kernels/ops/attention.h"
#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

struct Result {
  HostTensor out, lse, dqkv;
};

// `portable`: by the kernel that knows documents, all tokens being of one.
Result attend(OpExec& ex, const AttentionShape& s, std::int64_t sequences, bool portable) {
  const std::int64_t t = sequences * s.seq_len, q = s.heads * s.head_dim;
  const HostTensor qkv = random_tensor({t, s.qkv_width()}, DType::kBF16, 1),
                   dout = random_tensor({t, q}, DType::kBF16, 2), ids = filled({t}, DType::kI32, 3);
  Result r{HostTensor({t, q}, DType::kBF16), HostTensor({t, s.heads}, DType::kF32),
           HostTensor({t, s.qkv_width()}, DType::kBF16)};
  const ConstTensorView documents = portable ? ids : ConstTensorView{};
  ops::attention_forward(ex, r.out, r.lse, qkv, s, documents);
  ops::attention_backward(ex, r.dqkv, dout, qkv, {r.out, r.lse}, s, documents);
  return r;
}

std::vector<float> floats(const HostTensor& t) {
  const std::vector<double> values = t.values();
  return {values.begin(), values.end()};
}

void expect_same(const Result& a, const Result& b) {
  EXPECT_LT(relative_distance(floats(a.out), floats(b.out)), 1e-2);
  EXPECT_LT(relative_distance(floats(a.lse), floats(b.lse)), 1e-5);
  EXPECT_LT(relative_distance(floats(a.dqkv), floats(b.dqkv)), 1e-2);
}

class Cudnn : public testing::TestWithParam<AttentionShape> {
 protected:
  OpExec ex;
};

TEST_P(Cudnn, ComputesWhatThePortableKernelDoes) {
  const int before = fake_cuda::cudnn_executions();
  const Result portable = attend(ex, GetParam(), 3, true);
  finish_ops();
  EXPECT_EQ(fake_cuda::cudnn_executions(), before) << "it knows no documents";
  const Result library = attend(ex, GetParam(), 3, false);
  finish_ops();
  EXPECT_EQ(fake_cuda::cudnn_executions(), before + 2);
  expect_same(library, portable);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Cudnn,
                         testing::Values(AttentionShape{1, 1, 8, 1}, AttentionShape{4, 4, 16, 33},
                                         AttentionShape{4, 2, 64, 20}, AttentionShape{6, 1, 24, 17},
                                         AttentionShape{2, 2, 128, 65}, AttentionShape{4, 2, 32, 40, 1},
                                         AttentionShape{4, 2, 32, 40, 13}, AttentionShape{2, 1, 64, 33, 32},
                                         AttentionShape{2, 1, 64, 33, 33}, AttentionShape{2, 1, 64, 33, 90}));

TEST(CudnnPlans, AreMadeOncePerShape) {
  OpExec ex;
  const AttentionShape s{2, 1, 32, 12};
  attend(ex, s, 2, false);
  const int before = fake_cuda::cudnn_builds();
  attend(ex, s, 2, false);
  EXPECT_EQ(fake_cuda::cudnn_builds(), before);
  attend(ex, s, 3, false);  // other sizes, other plans: forward and backward
  EXPECT_EQ(fake_cuda::cudnn_builds(), before + 2);
  finish_ops();
}

// The deterministic backward's temporary memory grows with the square of the length: what is computed in slices of
// sequences, or of heads, has the same bits.
TEST(CudnnPlans, LongSequencesAreComputedInSlices) {
  const AttentionShape s{6, 3, 16, 40};
  const std::int64_t head = 40 * 40 * 2, whole_limit = std::int64_t{2} << 30;
  struct Case {
    std::int64_t limit;
    int slices;
    std::int64_t heads;  // of the largest one
  };
  Result whole = [&] {
    OpExec ex;
    Result r = attend(ex, s, 5, false);
    finish_ops();
    return r;
  }();
  for (const Case& c :
       {Case{12 * head, 3, 12}, Case{6 * head, 5, 6}, Case{5 * head, 10, 4}, Case{head, 15, 2}}) {
    OpExec ex;
    cuda::limit_sdpa_workspace(c.limit);
    const int before = fake_cuda::cudnn_executions();
    const Result sliced = attend(ex, s, 5, false);
    finish_ops();
    cuda::limit_sdpa_workspace(whole_limit);
    EXPECT_EQ(fake_cuda::cudnn_executions(), before + 1 + c.slices) << c.limit;
    EXPECT_TRUE(sliced.dqkv == whole.dqkv) << c.limit;
    const std::int64_t besides = 5 * 40 * 6 * 4 + 2 * 4096;  // log-sum-exps; cuDNN's own
    EXPECT_LE(static_cast<std::int64_t>(ex.scratch_peak()), c.heads * head + besides + 1024) << c.limit;
  }
}

TEST(SdpaSlices, AreWhatTheirMemoryHolds) {
  const auto slices = [](std::int64_t heads, std::int64_t kv_heads, std::int64_t seq_len,
                         std::int64_t tokens) {
    return cuda::backward_slices({.heads = heads, .kv_heads = kv_heads, .head_dim = 128, .seq_len = seq_len},
                                 tokens, std::int64_t{2} << 30);
  };
  EXPECT_EQ(slices(16, 16, 2048, 32768).size(), 1u);  // 16 heads * 16 sequences * 8 MiB
  EXPECT_EQ(slices(16, 16, 4096, 32768).size(), 2u);
  EXPECT_EQ(slices(16, 16, 32768, 32768).size(), 16u);  // one head is 2 GiB
  EXPECT_EQ(slices(16, 2, 32768, 65536).size(), 4u);    // eight heads that share one key head stay together
  for (const auto& [heads, kv_heads, seq_len, sequences] :
       {std::array{16, 4, 8192, 3}, {12, 12, 5000, 7}, {16, 16, 16384, 2}}) {
    std::int64_t covered = 0;
    for (const cuda::SdpaSlice& s : slices(heads, kv_heads, seq_len, std::int64_t{seq_len} * sequences)) {
      EXPECT_LE(s.sequences * s.kv_heads * (heads / kv_heads) * seq_len * seq_len * 2, std::int64_t{2} << 30);
      EXPECT_TRUE(s.kv_heads == kv_heads || s.sequences == 1);
      covered += s.sequences * s.kv_heads;
    }
    EXPECT_EQ(covered, sequences * kv_heads);
  }
}

// --- documents

// Of three sequences: the first is one, the others have some of one token and of many.
std::vector<std::int32_t> runs_in(std::int64_t seq_len) {
  const auto s = static_cast<std::int32_t>(seq_len);
  return {0, s, s + 1, s + 2, s + 2 + s / 2, 2 * s, 2 * s + s - 3, 2 * s + s - 1, 3 * s};
}

// `known`: the runs are, or the documents by token alone, which is the portable kernel's.
Result attend_documents(OpExec& ex, AttentionShape s, bool known) {
  const std::vector<std::int32_t> runs = runs_in(s.seq_len);
  const std::int64_t t = 3 * s.seq_len, q = s.heads * s.head_dim;
  const HostTensor qkv = random_tensor({t, s.qkv_width()}, DType::kBF16, 1),
                   dout = random_tensor({t, q}, DType::kBF16, 2);
  HostTensor ids({t}, DType::kI32);
  for (std::size_t i = 0; i + 1 < runs.size(); ++i)
    for (std::int32_t at = runs[i]; at < runs[i + 1]; ++at)
      ids.set(static_cast<std::size_t>(at), static_cast<double>(i));
  Result r{filled({t, q}, DType::kBF16, 9), filled({t, s.heads}, DType::kF32, 9),
           filled({t, s.qkv_width()}, DType::kBF16, 9)};
  if (known) s.runs = runs;
  ops::attention_forward(ex, r.out, r.lse, qkv, s, ids);
  ops::attention_backward(ex, r.dqkv, dout, qkv, {r.out, r.lse}, s, ids);
  finish_ops();
  return r;
}

class CudnnDocuments : public testing::TestWithParam<AttentionShape> {};

TEST_P(CudnnDocuments, AreWhatThePortableKernelComputes) {
  OpExec ex;
  const int before = fake_cuda::cudnn_executions();
  const Result portable = attend_documents(ex, GetParam(), false);
  EXPECT_EQ(fake_cuda::cudnn_executions(), before);
  const Result library = attend_documents(ex, GetParam(), true);
  EXPECT_GT(fake_cuda::cudnn_executions(), before);
  expect_same(library, portable);
  EXPECT_TRUE(attend_documents(ex, GetParam(), true).dqkv == library.dqkv);
  EXPECT_EQ(ex.scratch_used(), 0u);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudnnDocuments,
                         testing::Values(AttentionShape{4, 4, 16, 33}, AttentionShape{4, 2, 64, 90},
                                         AttentionShape{6, 1, 24, 150}, AttentionShape{2, 1, 128, 200, 17},
                                         AttentionShape{4, 2, 32, 70, 1}));

TEST(CudnnDocumentPlans, AreAsFewAsLengthsAndFoundAgain) {
  OpExec ex;
  const AttentionShape s{2, 1, 40, 130};  // documents of 130, of 65 to 128, and shorter ones
  const int before = fake_cuda::cudnn_builds(), executed = fake_cuda::cudnn_executions();
  attend_documents(ex, s, true);
  EXPECT_EQ(fake_cuda::cudnn_builds(), before + 2 * 3);
  EXPECT_EQ(fake_cuda::cudnn_executions(), executed + 2 * 3);
  attend_documents(ex, s, true);
  EXPECT_EQ(fake_cuda::cudnn_builds(), before + 2 * 3);
}

// Parts of heads and of documents have the same bits, in bounded memory.
TEST(CudnnDocumentPlans, AreComputedInSlices) {
  const AttentionShape s{6, 3, 16, 60};
  OpExec ex;
  const Result whole = attend_documents(ex, s, true);
  for (const std::int64_t limit : {12 * 60 * 60 * 2, 6 * 60 * 60 * 2, 60 * 60 * 2}) {
    OpExec sliced_ex;
    cuda::limit_sdpa_workspace(limit);
    const int before = fake_cuda::cudnn_executions();
    const Result sliced = attend_documents(sliced_ex, s, true);
    cuda::limit_sdpa_workspace(std::int64_t{2} << 30);
    EXPECT_GT(fake_cuda::cudnn_executions(), before + 2) << limit;
    EXPECT_TRUE(sliced.dqkv == whole.dqkv) << limit;
    const std::int64_t one_group = 2 * 60 * 60 * 2, besides = 8 * 6 * 60 * 4 + 4 * 512 + 2 * 4096;
    EXPECT_LE(static_cast<std::int64_t>(sliced_ex.scratch_peak()), std::max(limit, one_group) + besides)
        << limit;
  }
}

TEST(CudnnDocumentPlans, RefusedOnesAreComputedByThePortableKernelAndTold) {
  OpExec ex;
  const AttentionShape s{2, 2, 56, 41};
  const Result portable = attend_documents(ex, s, false);
  const int before = fake_cuda::cudnn_executions();
  fake_cuda::fail_next("cudnn graph", 1);
  testing::internal::CaptureStderr();
  const Result fallback = attend_documents(ex, s, true);
  const std::string told = testing::internal::GetCapturedStderr();
  EXPECT_EQ(fake_cuda::cudnn_executions(), before);
  EXPECT_EQ(fallback.out.values(), portable.out.values());
  EXPECT_EQ(fallback.dqkv.values(), portable.dqkv.values());
  EXPECT_THAT(told,
              testing::HasSubstr("3 sequences of 41 with documents masked: the portable kernel computes it; "
                                 "cuDNN: no engine supports this graph"));
}

TEST(DocumentSlices, HaveEveryDocumentAndHeadOnce) {
  std::vector<std::int32_t> runs{0};
  for (std::int32_t i = 0; runs.back() < 8 * 1024; ++i) {
    const std::int32_t end = runs.back() + 1 + i * i % 777;
    const std::int32_t border = (runs.back() / 1024 + 1) * 1024;
    runs.push_back(std::min(end, border));
  }
  for (const std::int64_t most :
       {std::int64_t{0}, std::int64_t{1} << 30, std::int64_t{1} << 24, std::int64_t{1}}) {
    const AttentionShape s{.heads = 8, .kv_heads = 4, .head_dim = 64, .seq_len = 1024, .runs = runs};
    std::map<std::pair<std::int32_t, std::int64_t>, std::int32_t> sizes;
    for (const cuda::DocumentSlice& slice : cuda::document_slices(s, most)) {
      ASSERT_LE(static_cast<std::int64_t>(slice.size.size()), slice.batch);
      EXPECT_EQ(slice.batch & (slice.batch - 1), 0) << "few sizes of batches";
      const std::int64_t memory = slice.batch * 2 * slice.kv_heads * slice.length * slice.length * 2;
      EXPECT_TRUE(most == 0 || memory <= most || (slice.batch == 1 && slice.kv_heads == 1)) << memory;
      for (std::size_t i = 0; i < slice.size.size(); ++i) {
        EXPECT_LE(slice.size[i], slice.length);
        for (std::int64_t h = slice.first_kv_head; h < slice.first_kv_head + slice.kv_heads; ++h)
          EXPECT_TRUE(sizes.emplace(std::pair{slice.begin[i], h}, slice.size[i]).second);
      }
    }
    EXPECT_EQ(sizes.size(), 4 * (runs.size() - 1));
    for (std::size_t i = 0; i + 1 < runs.size(); ++i) EXPECT_EQ((sizes[{runs[i], 3}]), runs[i + 1] - runs[i]);
  }
}

TEST(CudnnPlans, AreInOrderUnlessAskedOtherwise) {
  OpExec ex;
  Exec& exec = ex;
  const AttentionShape s{2, 1, 32, 14};
  const int before = fake_cuda::cudnn_any_order_builds();
  const Result ordered = attend(ex, s, 2, false);
  EXPECT_EQ(fake_cuda::cudnn_any_order_builds(), before);
  exec.deterministic = false;
  const Result any_order = attend(ex, s, 2, false);
  attend(ex, s, 2, false);
  EXPECT_EQ(fake_cuda::cudnn_any_order_builds(), before + 1) << "backward's plan alone, once";
  exec.deterministic = true;
  attend(ex, s, 2, false);
  EXPECT_EQ(fake_cuda::cudnn_any_order_builds(), before + 1);
  finish_ops();
  expect_same(any_order, ordered);
}

TEST(CudnnPlans, RefusedOnesAreComputedByThePortableKernelAndTold) {
  OpExec ex;
  const AttentionShape s{2, 2, 40, 21};
  const Result portable = attend(ex, s, 2, true);
  const int before = fake_cuda::cudnn_executions();
  fake_cuda::fail_next("cudnn graph", 1);
  testing::internal::CaptureStderr();
  const Result fallback = attend(ex, s, 2, false);
  attend(ex, s, 2, false);
  finish_ops();
  const std::string told = testing::internal::GetCapturedStderr();
  EXPECT_EQ(fake_cuda::cudnn_executions(), before);
  EXPECT_EQ(fallback.out.values(), portable.out.values());
  EXPECT_THAT(told,
              testing::HasSubstr("attention of 2 heads of 40 over 2 sequences of 21: the portable kernel"));
  EXPECT_THAT(told, testing::HasSubstr("no engine supports this graph"));
  EXPECT_EQ(told.find("portable kernel"), told.rfind("portable kernel")) << "once";
}

TEST(CudnnPlans, AFailureIsAnError) {
  OpExec ex;
  const AttentionShape s{2, 2, 48, 5};
  attend(ex, s, 1, false);
  fake_cuda::fail_next("cudnn execute", 1);
  try {
    attend(ex, s, 1, false);
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kDevice);
    EXPECT_THAT(e.what(), testing::HasSubstr("cuDNN: attention: CUDNN_STATUS_EXECUTION_FAILED"));
  }
  finish_ops();
}

// Heads that cuDNN does not take, and fp32, are not even asked for.
TEST(CudnnPlans, OnlyWhatFits) {
  OpExec ex;
  const int before = fake_cuda::cudnn_builds();
  attend(ex, {2, 2, 12, 5}, 1, false);
  attend(ex, {1, 1, 136, 5}, 1, false);
  finish_ops();
  EXPECT_EQ(fake_cuda::cudnn_builds(), before);
}

}  // namespace
}  // namespace upmoe::test
