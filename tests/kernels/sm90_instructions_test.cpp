// Each wrapper of an instruction on the model of the hardware. The same cases run on a GPU by tests/bench/sm90.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "tests/kernels/sm90_instructions_cases.h"

namespace upmoe::cuda::sm90 {
namespace {

struct Model {
  template <class T>
  class Buffer {
   public:
    explicit Buffer(std::size_t n) : values_(n) {}
    explicit Buffer(const std::vector<T>& from) : values_(from) {}
    T* data() const { return values_.data(); }
    std::vector<T> host() const { return values_; }

   private:
    mutable std::vector<T> values_;
  };
  template <class... Parameters, class... Arguments>
  static void run(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, std::size_t shared_bytes,
                  unsigned cluster, const Arguments&... arguments) {
    for (const auto when : {sm90_twin::When::kEarliest, sm90_twin::When::kLatest, sm90_twin::When::kAnytime})
      sm90_twin::run({blocks, threads, shared_bytes, cluster, when, 5}, [&] { kernel(arguments...); });
  }
};

TEST(Sm90Instructions, DoWhatTheirUsersExpect) {
  InstructionCases<Model>::each([](const char* name, const auto& wrong) { EXPECT_EQ(wrong(), "") << name; });
}

// The words of a mistake that `body` ends with; none where it does not.
template <class Body>
std::string words_of(const Body& body) {
  try {
    body();
  } catch (const std::runtime_error& mistake) {
    return mistake.what();
  }
  return "";
}
class Sm90TensorMaps : public testing::Test {
 protected:
  using Sizes = std::initializer_list<std::int64_t>;
  std::string words(Sizes sizes, Sizes strides, std::initializer_list<int> box,
                    std::size_t shifted = 0) const {
    return words_of([&] { make_tensor_map(memory + shifted, sizes, strides, box); });
  }
  // As make_tensor_map asks, but for what a test changes: eight rows of 64.
  struct Asked {
    CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    std::array<cuuint32_t, 5> box{64, 8, 1, 1, 1}, steps{1, 1, 1, 1, 1};
    CUtensorMapInterleave interleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
    CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
    CUtensorMapFloatOOBfill fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  };
  CUresult encode(const Asked& asked, CUtensorMap* map) {
    const cuuint64_t sizes[5] = {64, 8, 1, 1, 1}, strides[4] = {128, 1024, 1024, 1024};
    return cuTensorMapEncodeTiled(map, asked.type, 5, memory, sizes, strides, asked.box.data(),
                                  asked.steps.data(), asked.interleave, asked.swizzle,
                                  CU_TENSOR_MAP_L2_PROMOTION_NONE, asked.fill);
  }
  std::string words(const Asked& asked) {
    CUtensorMap map;
    return words_of([&] { EXPECT_EQ(encode(asked, &map), CUDA_SUCCESS); });
  }
  alignas(256) bf16 memory[512] = {};
};

TEST_F(Sm90TensorMaps, AreRefusedAsTheDriverRefusesThem) {
  using testing::HasSubstr;
  EXPECT_EQ(words({64, 8}, {128}, {64, 8}), "");
  EXPECT_THAT(words({64, 8}, {128}, {64, 8}, 4), HasSubstr("the address is no multiple of 16"));
  EXPECT_THAT(words({}, {}, {}), HasSubstr("do not fit"));
  EXPECT_THAT(words({8, 1, 1, 1, 1, 1}, {16, 16, 16, 16, 16}, {8, 1, 1, 1, 1, 1}), HasSubstr("do not fit"));
  EXPECT_THAT(words({64, 8}, {}, {64, 8}), HasSubstr("do not fit"));
  EXPECT_THAT(words({128, 8}, {256}, {128, 8}), HasSubstr("wider than the swizzle"));
  EXPECT_THAT(words({64, 8}, {128}, {12, 8}), HasSubstr("no multiple of 16 bytes"));
  EXPECT_THAT(words({64, 0}, {128}, {64, 8}), HasSubstr("a size that is none"));
  EXPECT_THAT(words({64, (std::int64_t{1} << 32) + 1}, {128}, {64, 8}), HasSubstr("a size that is none"));
  EXPECT_THAT(words({64, 8}, {136}, {64, 8}), HasSubstr("a stride that is no multiple"));
  EXPECT_THAT(words({64, 8}, {std::int64_t{1} << 40}, {64, 8}), HasSubstr("or too long"));
  EXPECT_THAT(words({64, 8}, {112}, {64, 8}), HasSubstr("rows that overlap"));
  EXPECT_THAT(words({64, 1000, 2}, {128, 512}, {64, 8, 1}),
              HasSubstr("below the size of the dimension before"));
  EXPECT_THAT(words({64, 512}, {128}, {64, 257}), HasSubstr("a box of none"));
  EXPECT_THAT(words({64, 512}, {128}, {64, 0}), HasSubstr("a box of none"));
}
TEST_F(Sm90TensorMaps, AreEncodedByTheRulesOfTheirOtherArguments) {
  using testing::HasSubstr;
  EXPECT_EQ(words(Asked{}), "");
  EXPECT_EQ(words({.steps = {1, 8, 1, 1, 8}}), "");
  for (const std::array<cuuint32_t, 5>& steps :
       {std::array<cuuint32_t, 5>{0, 1, 1, 1, 1}, {1, 0, 1, 1, 1}, {1, 1, 1, 1, 0}, {1, 9, 1, 1, 1}})
    EXPECT_THAT(words({.steps = steps}), HasSubstr("a step over no elements, or over more than 8"));
  EXPECT_EQ(words({.box = {8, 8, 1, 1, 1}}), "");
  for (const cuuint32_t elements : {4u, 12u, 63u})
    EXPECT_THAT(words({.box = {elements, 8, 1, 1, 1}}), HasSubstr("rows are no multiple of 16 bytes"));
  EXPECT_THAT(words({.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16}), HasSubstr("other than bf16"));
  EXPECT_THAT(words({.interleave = CU_TENSOR_MAP_INTERLEAVE_16B}), HasSubstr("interleaving"));
  EXPECT_THAT(words({.swizzle = CU_TENSOR_MAP_SWIZZLE_64B}), HasSubstr("only the 128-byte swizzle"));
  EXPECT_THAT(words({.fill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA}), HasSubstr("only zeros"));
  alignas(64) unsigned char place[sizeof(CUtensorMap) + 64];
  EXPECT_THAT(words_of([&] { encode({}, reinterpret_cast<CUtensorMap*>(place + 32)); }),
              HasSubstr("its own address is no multiple of 64"));
}
// Of a box of eight rows every third: rows 0, 3 and 6.
TEST_F(Sm90TensorMaps, AreLoadedByTheirStepsOfElements) {
  for (std::size_t i = 0; i < std::size(memory); ++i) memory[i].bits = static_cast<std::uint16_t>(i);
  CUtensorMap map;
  ASSERT_EQ(encode({.steps = {1, 3, 1, 1, 1}}, &map), CUDA_SUCCESS);
  std::vector<unsigned char> image(kImageBytes);
  EXPECT_EQ(words_of([&] {
              sm90_twin::run({1, 32, sizeof(ImageShared), 1, sm90_twin::When::kLatest, 1}, [&] {
                auto& s = dynamic_shared<ImageShared>();
                if (threadIdx.x != 0) return;
                mbarrier_init(&s.full, 1);
                fence_mbarrier_init();
                mbarrier_arrive_expect_tx(&s.full, 3 * 128);
                tma_load(s.image, map, &s.full, 0, 0, 0, 0, 0);
                mbarrier_wait(&s.full, 0);
                std::copy_n(s.image, 3 * 128, image.begin());
              });
            }),
            "");
  for (std::size_t r = 0; r < 3; ++r)
    for (std::size_t c = 0; c < 64; ++c) EXPECT_EQ(image_at(image, r, c), 3 * r * 64 + c) << r << ", " << c;
}
TEST_F(Sm90TensorMaps, AreLoadedByAsManyCoordinatesFromAMultipleOf64) {
  const TensorMap map = make_tensor_map(memory, {64, 2, 1}, {128, 256}, {64, 2, 1});
  const auto load = [](const TensorMap& from, auto... at) {
    return words_of([&] {
      sm90_twin::run({1, 32, sizeof(ImageShared), 1, sm90_twin::When::kEarliest, 1}, [&] {
        auto& s = dynamic_shared<ImageShared>();
        if (threadIdx.x != 0) return;
        mbarrier_init(&s.full, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(&s.full, 256);
        tma_load(s.image, from, &s.full, at...);
        mbarrier_wait(&s.full, 0);
      });
    });
  };
  EXPECT_EQ(load(map, 0, 0, 0), "");
  EXPECT_THAT(load(map, 0, 0), testing::HasSubstr("other coordinates than the map has dimensions"));
  alignas(64) unsigned char shifted[sizeof(TensorMap) + 64];
  auto* elsewhere = reinterpret_cast<TensorMap*>(shifted + 16);
  std::memcpy(static_cast<void*>(elsewhere), &map, sizeof map);
  EXPECT_THAT(load(*elsewhere, 0, 0, 0), testing::HasSubstr("the map's address is no multiple of 64"));
}

// What a GPU hangs at, faults at or silently computes wrongly, the model refuses with words.
template <class Body>
std::string words_of_run(unsigned blocks, unsigned cluster, unsigned threads, const Body& body) {
  return words_of([&] {
    sm90_twin::run({blocks, threads, sizeof(ImageShared), cluster, sm90_twin::When::kLatest, 1}, body);
  });
}
TEST_F(Sm90TensorMaps, AreLoadedToBarriersThatWereShownInBlocksThatThereAre) {
  const TensorMap map = make_tensor_map(memory, {64, 2}, {128}, {64, 2});
  const auto load = [&](bool shown, u32 bytes, std::uint16_t blocks) {
    return words_of_run(2, 2, 32, [&] {
      auto& s = dynamic_shared<ImageShared>();
      if (threadIdx.x == 0) {
        mbarrier_init(&s.full, 1);
        if (shown) fence_mbarrier_init();
        mbarrier_arrive_expect_tx(&s.full, bytes);
      }
      cluster_sync();
      if (threadIdx.x == 0 && cluster_rank() == 0) tma_load_multicast(blocks, s.image, map, &s.full, 0, 0);
      mbarrier_wait(&s.full, 0);
      cluster_sync();
    });
  };
  using testing::HasSubstr;
  EXPECT_EQ(load(true, 256, 3), "");
  EXPECT_THAT(load(false, 256, 3), HasSubstr("has not shown the barrier that it made (fence.mbarrier_init)"));
  EXPECT_THAT(load(true, 256, 7), HasSubstr("to a block that the cluster does not have"));
  EXPECT_THAT(load(true, 256, 0), HasSubstr("to a block that the cluster does not have"));
  EXPECT_THAT(load(true, 1u << 20, 3), HasSubstr("expect_tx: more bytes than a barrier counts"));
}
TEST(Sm90Barriers, CountArrivalsOfAllWhoMayKnowThem) {
  using testing::HasSubstr;
  const auto tell = [&](u32 arrivals, bool shown) {
    return words_of_run(2, 2, 32, [&] {
      auto& s = dynamic_shared<ImageShared>();
      if (threadIdx.x == 0) {
        mbarrier_init(&s.told, arrivals);
        if (shown) fence_mbarrier_init();
      }
      cluster_sync();
      if (threadIdx.x < 2) mbarrier_arrive_remote(&s.told, threadIdx.x);
      mbarrier_wait(&s.told, 0);
      cluster_sync();
    });
  };
  EXPECT_EQ(tell(2, true), "");
  EXPECT_THAT(tell(2, false), HasSubstr("mbarrier.arrive at another block: thread 0 has not shown"));
  EXPECT_THAT(tell(0, true), HasSubstr("mbarrier.init: 0 arrivals"));
  EXPECT_THAT(tell(1u << 20, true), HasSubstr("mbarrier.init: 1048576 arrivals"));
}
TEST(Sm90Launches, AreRefusedAsTheRuntimeRefusesThem) {
  using testing::HasSubstr;
  const auto nothing = [] {};
  EXPECT_EQ(words_of_run(8, 8, 32, nothing), "");
  EXPECT_THAT(words_of_run(0, 1, 32, nothing), HasSubstr("a grid of no blocks"));
  EXPECT_THAT(words_of_run(16, 16, 32, nothing), HasSubstr("of more than 8 blocks"));
  EXPECT_THAT(words_of_run(9, 2, 32, nothing), HasSubstr("not whole clusters"));
  EXPECT_THAT(words_of_run(1, 1, 1056, nothing), HasSubstr("too many threads"));
}
// What a block's warpgroups were launched with is all that they can exchange: the rest of the multiprocessor is no part
// of it, and setmaxnreg.inc would wait for ever.
TEST(Sm90Registers, MoveWithinABlock) {
  const auto words = [](bool fewer) {
    return words_of_run(1, 1, 384, [fewer] {
      if (threadIdx.x / 128 == 2)
        fewer ? setmaxnreg_dec<48>() : setmaxnreg_dec<40>();
      else
        setmaxnreg_inc<232>();
    });
  };
  EXPECT_EQ(words(false), "");
  EXPECT_THAT(words(true), testing::HasSubstr("wait for registers (setmaxnreg.inc)"));
}
TEST(Sm90Products, BeginAtTheFirstOfEightRows) {
  const auto words = [](u32 row) {
    return words_of_run(1, 1, 128, [row] {
      auto& s = dynamic_shared<ImageShared>();
      float d[64] = {};
      wgmma_fence();
      wgmma_m64n128k16<Major::kK, Major::kK>(d, k_major(s.image, row, 0), k_major(s.image, 0, 0), false);
      wgmma_commit();
      wgmma_wait<0>();
    });
  };
  EXPECT_EQ(words(8), "");
  EXPECT_THAT(words(4), testing::HasSubstr("begins behind the first of the swizzle's eight rows"));
}

}  // namespace
}  // namespace upmoe::cuda::sm90
