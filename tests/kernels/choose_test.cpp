// Which kernel computes what: the choices themselves, without a GPU. That the ops follow them: cublaslt_test and
// cudnn_test.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "kernels/cuda/choose/attention.h"
#include "kernels/cuda/choose/attention_decode.h"
#include "kernels/cuda/choose/chosen.h"
#include "kernels/cuda/choose/cross_entropy.h"
#include "kernels/cuda/choose/dense_product.h"
#include "kernels/cuda/choose/expert_ffn.h"
#include "kernels/cuda/choose/expert_products.h"
#include "kernels/cuda/choose/expert_variant.h"

namespace upmoe::cuda {
namespace {

using testing::HasSubstr;

const bool kShown = setenv("UPMOE_SHOW_KERNELS", "1", 1) == 0;  // before the first choice

constexpr Gpu kHopper{.sm = 90, .cudnn = true}, kHopperWithoutCudnn{.sm = 90, .cudnn = false};

AttentionDescription attention(DType dtype) {
  return {.shape = {.heads = 16, .kv_heads = 8, .head_dim = 128, .seq_len = 512},
          .tokens = 2048,
          .dtype = dtype,
          .refusal = {}};
}

void expect_portable(const AttentionDescription& d, const Gpu& gpu, const std::string& words) {
  const AttentionChoice choice = choose(d, gpu);
  EXPECT_EQ(choice.kernel, AttentionKernel::kPortable) << words_of(d);
  EXPECT_EQ(choice.warning.empty(), words.empty()) << choice.warning;
  EXPECT_THAT(choice.warning, HasSubstr(words));
}

TEST(ChooseAttention, CudnnInBf16) {
  const AttentionChoice choice = choose(attention(DType::kBF16), kHopper);
  EXPECT_EQ(choice.kernel, AttentionKernel::kCudnn);
  EXPECT_EQ(choice.warning, "");
}

TEST(ChooseAttention, CudnnWithAWindow) {
  AttentionDescription d = attention(DType::kBF16);
  d.shape.window = 100;
  EXPECT_EQ(choose(d, kHopper).kernel, AttentionKernel::kCudnn);
  EXPECT_THAT(words_of(d), HasSubstr("sequences of 512, bf16, a window of 100"));
}

TEST(ChooseAttention, CudnnWithDocumentsWhoseRunsAreKnown) {
  AttentionDescription d = attention(DType::kBF16);
  d.documents = d.runs = true;
  EXPECT_EQ(choose(d, kHopper).kernel, AttentionKernel::kCudnn);
  EXPECT_EQ(choose(d, kHopper).warning, "");
  expect_portable(d, kHopperWithoutCudnn, "built without cuDNN");
  d.refusal = "no engine";
  expect_portable(
      d, kHopper,
      "4 sequences of 512 with documents masked: the portable kernel computes it; cuDNN: no engine");
  d.refusal = "";
  d.pair = true;
  expect_portable(d, kHopper, "parallel.cp");
}

TEST(ChooseAttention, ThePortableKernelWhereNothingIsLost) {
  AttentionDescription none = attention(DType::kBF16), documents = attention(DType::kF32);
  none.tokens = 0;
  documents.documents = true;
  expect_portable(none, kHopper, "");
  expect_portable(documents, kHopper, "");
  expect_portable(attention(DType::kF32), kHopperWithoutCudnn, "");
}

TEST(ChooseAttention, ThePortableKernelWithTheReasonWhereItIsSlow) {
  AttentionDescription d = attention(DType::kBF16);
  expect_portable(d, kHopperWithoutCudnn, "built without cuDNN");
  d.refusal = "no engine";
  expect_portable(d, kHopper,
                  "attention of 16 heads of 128 over 4 sequences of 512: the portable kernel computes it; "
                  "cuDNN: no engine");
  for (const std::int64_t head_dim : {12, 136}) {
    d.shape.head_dim = head_dim;
    expect_portable(d, kHopper, "heads of " + std::to_string(head_dim));
  }
  d.documents = true;
  expect_portable(d, kHopper, "known by token alone");
  d.pair = true;
  expect_portable(d, kHopperWithoutCudnn, "parallel.cp");
}

TEST(ChooseDecode, TilesWhereARunFillsAQuarterOfOne) {
  DecodeDescription d{.shape = {.heads = 16, .kv_heads = 8, .head_dim = 128, .window = 100},
                      .tokens = 64,
                      .dtype = DType::kBF16};
  for (const std::int64_t run : {0, 1, 15}) {
    d.run = run;
    EXPECT_EQ(choose(d, kHopper), DecodeKernel::kTokens) << run;
  }
  for (const std::int64_t run : {16, 17, 64}) {
    d.run = run;
    EXPECT_EQ(choose(d, kHopper), DecodeKernel::kRun) << run;
  }
  EXPECT_THAT(words_of(d), HasSubstr("64 tokens, 64 of them a run, bf16, a window of 100"));
}

TEST(ChooseDense, ByWhatThereIsToSum) {
  const auto kernel = [](std::int64_t m, std::int64_t n, std::int64_t k, Accumulate mode) {
    return choose(DenseDescription{.m = m, .n = n, .k = k, .mode = mode, .bias = {}}, kHopper);
  };
  EXPECT_EQ(kernel(3, 4, 5, Accumulate::kOverwrite), DenseKernel::kCublasLt);
  EXPECT_EQ(kernel(0, 4, 5, Accumulate::kOverwrite), DenseKernel::kNone);
  EXPECT_EQ(kernel(3, 0, 0, Accumulate::kOverwrite), DenseKernel::kNone);
  EXPECT_EQ(kernel(3, 4, 0, Accumulate::kOverwrite), DenseKernel::kFill);
  EXPECT_EQ(kernel(3, 4, 0, Accumulate::kAdd), DenseKernel::kNone);
}

TEST(ChooseDense, ABiasOfAnotherDtypeComesBeforeTheProduct) {
  DenseDescription d{.m = 3, .n = 4, .k = 5, .in = DType::kBF16, .out = DType::kBF16, .bias = DType::kBF16};
  EXPECT_EQ(choose(d, kHopper), DenseKernel::kCublasLt);
  d.out = DType::kF32;
  EXPECT_EQ(choose(d, kHopper), DenseKernel::kFillThenCublasLt);
  d.k = 0;
  EXPECT_EQ(choose(d, kHopper), DenseKernel::kFill);
}

TEST(ChooseCrossEntropy, AsManyBlocksAsKeepTwoRowsOnAMultiprocessor) {
  const auto blocks = [](std::int64_t columns) {
    return choose(CrossEntropyDescription{.wish = CrossEntropyPath::kClusters,
                                          .rows = 4096,
                                          .columns = columns,
                                          .gradient = true,
                                          .packed = true},
                  kHopper)
        .blocks;
  };
  constexpr std::int64_t kFour = 4, kOfTwo = 112 * 256, kOfOne = 226 * 256;  // logits that fit
  EXPECT_EQ(blocks(kFour), 1);
  EXPECT_EQ(blocks(kOfTwo), 1);
  EXPECT_EQ(blocks(kOfTwo + kFour), 2);
  EXPECT_EQ(blocks(2 * kOfTwo), 2);
  EXPECT_EQ(blocks(2 * kOfTwo + kFour), 4);
  EXPECT_EQ(blocks(4 * kOfTwo + kFour), 8);
  EXPECT_EQ(blocks(151936), 8);
  EXPECT_EQ(blocks(8 * kOfOne), 8) << "one row on a multiprocessor";
  EXPECT_EQ(blocks(8 * kOfOne + kFour), 0);
  EXPECT_EQ(blocks(151937), 0) << "rows begin between two packs";
}

TEST(ChooseCrossEntropy, ThePortableKernelElsewhere) {
  const CrossEntropyDescription d{
      .wish = CrossEntropyPath::kClusters, .rows = 4096, .columns = 151936, .gradient = true, .packed = true};
  const auto portable = [&](const auto& change, const Gpu& gpu = kHopper) {
    CrossEntropyDescription other = d;
    change(other);
    const CrossEntropyChoice choice = choose(other, gpu);
    EXPECT_EQ(choice.kernel, CrossEntropyKernel::kPortable);
    return choice.reason;
  };
  EXPECT_EQ(choose(d, kHopper).kernel, CrossEntropyKernel::kCluster);
  EXPECT_EQ(choose(d, kHopper).reason, "");
  for (const CrossEntropyPath wish : {CrossEntropyPath::kAuto, CrossEntropyPath::kPortable})
    EXPECT_EQ(portable([&](auto& o) { o.wish = wish; }), "") << "nobody asked";
  EXPECT_EQ(portable([](auto& o) { o.gradient = false; }), "") << "both read a row once";
  EXPECT_EQ(portable([](auto& o) { o.rows = 0; }), "");
  const auto same = [](auto&) {};
  EXPECT_THAT(portable(same, Gpu{.sm = 80}),
              HasSubstr("capability 9.0, this one has 8.0; the portable kernel"));
  EXPECT_THAT(portable(same, Gpu{.sm = 100}), HasSubstr("kernels.cross_entropy: clusters: "));
  EXPECT_THAT(portable([](auto& o) { o.packed = false; }), HasSubstr("whole packs"));
  EXPECT_THAT(portable([](auto& o) { o.columns = 151937; }), HasSubstr("rows of 151937 logits"));
  EXPECT_THAT(portable([](auto& o) { o.columns = 1 << 20; }), HasSubstr("more than 8 blocks keep"));
  EXPECT_THAT(portable([](auto& o) { o.rows = 1LL << 29; }), HasSubstr("too many"));
  EXPECT_THAT(words_of(d), HasSubstr("151936 columns, gradient in fp32"));
}

TEST(ChooseExperts, ByWhatThereIsToSum) {
  const auto kernel = [](ExpertsProduct product, std::int64_t rows, std::int64_t n, std::int64_t k,
                         Accumulate mode = Accumulate::kOverwrite) {
    return choose(
        ExpertsDescription{.product = product, .experts = 2, .rows = rows, .n = n, .k = k, .mode = mode},
        kHopper);
  };
  for (const auto product :
       {ExpertsProduct::kForward, ExpertsProduct::kInputGradient, ExpertsProduct::kWeightGradient})
    EXPECT_EQ(kernel(product, 9, 4, 5), ExpertsKernel::kCublasLt);
  EXPECT_EQ(kernel(ExpertsProduct::kForward, 0, 4, 5), ExpertsKernel::kNone);
  EXPECT_EQ(kernel(ExpertsProduct::kForward, 9, 0, 5), ExpertsKernel::kNone);
  EXPECT_EQ(kernel(ExpertsProduct::kForward, 9, 4, 0), ExpertsKernel::kZeros);
  EXPECT_EQ(kernel(ExpertsProduct::kInputGradient, 9, 4, 0), ExpertsKernel::kNone);
  EXPECT_EQ(kernel(ExpertsProduct::kInputGradient, 9, 0, 5), ExpertsKernel::kZeros);
  EXPECT_EQ(kernel(ExpertsProduct::kWeightGradient, 9, 4, 0), ExpertsKernel::kNone);
  EXPECT_EQ(kernel(ExpertsProduct::kWeightGradient, 0, 4, 5), ExpertsKernel::kZeros);
  EXPECT_EQ(kernel(ExpertsProduct::kWeightGradient, 0, 4, 5, Accumulate::kAdd), ExpertsKernel::kNone);
}

TEST(ChooseExpertFfn, FusedWhereAskedForAndPossible) {
  ExpertFfnDescription d{
      .wish = ExpertsPath::kFused,
      .shape = {
          .experts = 60, .width = 2048, .neurons = 1408, .dtype = DType::kBF16, .gradient = DType::kBF16}};
  EXPECT_TRUE(choose(d, kHopper).fused);
  EXPECT_EQ(choose(d, kHopper).reason, "");
  // Until a record of a GPU says otherwise.
  for (const ExpertsPath wish : {ExpertsPath::kAuto, ExpertsPath::kStreams}) {
    d.wish = wish;
    EXPECT_FALSE(choose(d, kHopper).fused);
    EXPECT_EQ(choose(d, kHopper).reason, "") << "nothing was asked for in vain";
  }
}

TEST(ChooseExpertFfn, SaysWhyNot) {
  const ExpertFfnDescription fits{
      .wish = ExpertsPath::kFused,
      .shape = {.experts = 8, .width = 512, .neurons = 384, .dtype = DType::kBF16, .gradient = DType::kBF16}};
  const auto reason = [&](auto change, Gpu gpu = kHopper) {
    ExpertFfnDescription d = fits;
    change(d.shape);
    const ExpertFfnChoice c = choose(d, gpu);
    EXPECT_NE(c.fused, !c.reason.empty());
    return c.reason;
  };
  EXPECT_EQ(reason([](auto&) {}), "");
  for (const int sm : {80, 89, 100, 103, 120})
    EXPECT_THAT(reason([](auto&) {}, {.sm = sm, .cudnn = true}), HasSubstr("compute capability 9.0"));
  EXPECT_THAT(reason([](auto& s) { s.dtype = DType::kF32; }), HasSubstr("weights are fp32"));
  EXPECT_THAT(reason([](auto& s) { s.gradient = DType::kF32; }), HasSubstr("parallel.reduce"));
  EXPECT_THAT(reason([](auto& s) { s.width = 128; }), HasSubstr("width is 128, no multiple of 256"));
  EXPECT_THAT(reason([](auto& s) { s.neurons = 352; }), HasSubstr("352 neurons here, no multiple of 128"));
  EXPECT_THAT(reason([](auto& s) { s.experts = 257; }), HasSubstr("257 experts here"));
  EXPECT_EQ(reason([](auto& s) { s.experts = 256; }), "");
}

TEST(ChooseExpertVariant, ByTheTableOfTheDevice) {
  const ExpertProductShape shape{ExpertKernel::kDHidden, 60, 2048, 1408, 4096};
  const ExpertVariant other{2, 4};
  const ExpertVariants table{{{"NVIDIA H200", {{shape, other}}}}};
  const Gpu h200{.sm = 90, .cudnn = true, .device = "NVIDIA H200"};
  EXPECT_EQ(choose(ExpertVariantDescription{shape, &table}, h200), other);
  EXPECT_EQ(choose(ExpertVariantDescription{shape, &table}, kHopper), (ExpertVariant{2, 5}))
      << "another device";
  EXPECT_EQ(choose(ExpertVariantDescription{shape, nullptr}, h200), (ExpertVariant{2, 5})) << "no table";
  testing::internal::CaptureStderr();
  for (const std::int64_t rows : {4096, 4000, 1}) {
    ExpertVariantDescription d{shape, &table};
    d.shape.rows = rows;
    chosen(d, h200);
  }
  const std::string shown = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(shown.begin(), shown.end(), '\n'), 2) << shown;
  EXPECT_THAT(shown,
              HasSubstr("sm_90: kernel dhidden of 60 experts of 1408 neurons, width 2048: clusters of 2, 4 "
                        "stages, rows first, lag 0\n"));
}

TEST(Chosen, IsShownOnceForEachDescription) {
  ASSERT_TRUE(kShown);
  testing::internal::CaptureStderr();
  for (int i = 0; i < 2; ++i) {
    chosen(attention(DType::kBF16), kHopper);
    chosen(DenseDescription{.m = 3, .n = 4, .k = 5, .bias = DType::kBF16}, kHopper);
    for (const std::int64_t rows : {7, 9})
      chosen(ExpertsDescription{.experts = 2, .rows = rows, .n = 4, .k = 5}, kHopper);
  }
  const std::string shown = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(shown.begin(), shown.end(), '\n'), 3) << shown;
  EXPECT_THAT(
      shown,
      HasSubstr("sm_90: attention of 16 heads (8 of keys) of 128 over 4 sequences of 512, bf16: cuDNN\n"));
  EXPECT_THAT(shown,
              HasSubstr("sm_90: product of 3 x 4 x 5, fp32 to fp32, bias in bf16: a fill, then cuBLASLt\n"));
  EXPECT_THAT(
      shown,
      HasSubstr("sm_90: products of 2 experts of 4 x 5, forward, fp32 to fp32: cuBLASLt, a call for each "
                "expert\n"));
}

}  // namespace
}  // namespace upmoe::cuda
