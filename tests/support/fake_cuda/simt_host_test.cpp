// The pretended GPU itself: it must compute what a GPU does, and show the mistakes that a GPU only sometimes shows.

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "tests/support/fake_cuda/cuda_runtime.h"
#include "tests/support/fake_cuda/fake_cuda.h"

namespace {

void launch(unsigned blocks, unsigned threads, const std::function<void()>& body, std::size_t shared = 0) {
  simt::run(blocks, threads, shared, body);
}

class Orders : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { simt::set_order(static_cast<std::uint64_t>(GetParam())); }
  void TearDown() override { simt::set_order(0); }
};

TEST_P(Orders, EveryThreadRunsOnce) {
  std::vector<int> count(3 * 70);
  launch(3, 70, [&] { ++count[blockIdx.x * blockDim.x + threadIdx.x]; });
  EXPECT_EQ(count, std::vector<int>(3 * 70, 1));
}

TEST_P(Orders, BarriersAndSharedMemory) {
  std::vector<int> out(256);
  launch(1, 256, [&] {
    __shared__ int memory[256];
    memory[threadIdx.x] = static_cast<int>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = memory[255 - threadIdx.x];
  });
  for (int i = 0; i < 256; ++i) EXPECT_EQ(out[static_cast<std::size_t>(i)], 255 - i);
}

TEST_P(Orders, ShufflesAndVotes) {
  std::vector<int> sum(64), votes(64), same(64), up(64);
  launch(1, 64, [&] {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int x = static_cast<int>(threadIdx.x);
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    sum[threadIdx.x] = x;
    votes[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
    same[threadIdx.x] = __popc(__match_any_sync(0xffffffffu, lane % 5));
    up[threadIdx.x] = __shfl_up_sync(0xffffffffu, lane, 1);
  });
  for (std::size_t i = 0; i < 64; ++i) {
    EXPECT_EQ(sum[i], i < 32 ? 496 : 496 + 1024);
    EXPECT_EQ(static_cast<unsigned>(votes[i]), 0x49249249u);
    EXPECT_EQ(same[i], i % 32 % 5 < 2 ? 7 : 6);
    EXPECT_EQ(up[i], i % 32 == 0 ? 0 : static_cast<int>(i % 32) - 1);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Orders, testing::Values(0, 1, 7));

// Without its barrier this kernel reads what its neighbour has not written; rising order alone would hide it.
TEST(Mistakes, AMissingBarrierShows) {
  bool seen = false;
  for (std::uint64_t order : {0, 1, 7}) {
    simt::set_order(order);
    std::vector<int> out(128, -1);
    launch(1, 128, [&] {
      __shared__ int memory[128];
      memory[threadIdx.x] = -1;
      __syncthreads();
      memory[threadIdx.x] = static_cast<int>(threadIdx.x);
      if (threadIdx.x > 0) out[threadIdx.x] = memory[threadIdx.x - 1];
    });
    for (int i = 1; i < 128; ++i) seen = seen || out[static_cast<std::size_t>(i)] != i - 1;
  }
  simt::set_order(0);
  EXPECT_TRUE(seen);
}

TEST(MistakesDeathTest, EndTheProgramWithWords) {
  EXPECT_DEATH(launch(1, 64,
                      [] {
                        if (threadIdx.x < 32) __syncthreads();
                      }),
               "some lanes wait at __syncthreads, others have left");
  EXPECT_DEATH(launch(1, 32,
                      [] {
                        if (threadIdx.x > 0) __shfl_sync(0xffffffffu, 1, 0);
                      }),
               "names a lane that has left");
  EXPECT_DEATH(launch(1, 20, [] { __syncwarp(); }), "names a lane that has left or never was");
  EXPECT_DEATH(launch(1, 32, [] { __shfl_sync(1u, 1, 0); }), "not in the mask");
  EXPECT_DEATH(launch(1, 64,
                      [] {
                        if (threadIdx.x < 32) {
                          __syncthreads();
                        } else if (threadIdx.x == 40) {
                          __syncwarp();
                        } else {
                          __syncthreads();
                        }
                      }),
               "others at a shuffle");
}

TEST(Launches, WhatAGpuRefuses) {
  EXPECT_NE(simt::problem_of(0, 1, 0), nullptr);
  EXPECT_NE(simt::problem_of(1, 1025, 0), nullptr);
  EXPECT_NE(simt::problem_of(dim3(1, 65536), 32, 0), nullptr);
  EXPECT_NE(simt::problem_of(1, 32, 228 << 10), nullptr);
  EXPECT_EQ(simt::problem_of(dim3(1 << 20, 65535), 1024, 227 << 10), nullptr);
}

// Two streams, one writing what the other reads: right with an event between them, wrong without under some delay.
bool reads_what_was_written(bool waits) {
  cudaStream_t writer, reader;
  cudaEvent_t written;
  cudaStreamCreateWithFlags(&writer, cudaStreamNonBlocking);
  cudaStreamCreateWithFlags(&reader, cudaStreamNonBlocking);
  cudaEventCreateWithFlags(&written, cudaEventDisableTiming);
  int value = 0, seen = 0;
  for (int i = 1; i <= 200 && seen == value; ++i) {
    fake_cuda::enqueue(writer, [&value, i] { value = i; });
    cudaEventRecord(written, writer);
    if (waits) cudaStreamWaitEvent(reader, written, 0);
    fake_cuda::enqueue(reader, [&] { seen = value; });
    cudaStreamSynchronize(reader);
    cudaStreamSynchronize(writer);
  }
  cudaStreamDestroy(writer);
  cudaStreamDestroy(reader);
  cudaEventDestroy(written);
  return seen == value;
}

TEST(Streams, AReadWithoutAWaitShows) {
  fake_cuda::set_delays(3);
  EXPECT_TRUE(reads_what_was_written(true));
  EXPECT_FALSE(reads_what_was_written(false));
  fake_cuda::set_delays(0);
}

TEST(Streams, AnEventIsTheMomentOfItsRecord) {
  cudaStream_t first, second;
  cudaEvent_t event;
  cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking);
  cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking);
  cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess) << "never recorded";
  std::vector<int> order;
  fake_cuda::enqueue(first, [&] { order.push_back(1); });
  cudaEventRecord(event, first);
  cudaStreamWaitEvent(second, event, 0);
  fake_cuda::enqueue(second, [&] { order.push_back(2); });
  cudaEventRecord(event, second);  // recorded anew: the wait above keeps the old moment
  cudaEventSynchronize(event);
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
  cudaStreamDestroy(first);
  cudaStreamDestroy(second);
  cudaEventDestroy(event);
}

}  // namespace
