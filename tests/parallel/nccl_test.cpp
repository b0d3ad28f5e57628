// What NCCL is asked for, and what becomes of its errors, between pretended GPUs.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "parallel/nccl_channel.h"
#include "parallel/runtime.h"
#include "parallel/watchdog.h"
#include "tests/parallel/nccl_ranks.h"

namespace upmoe {

namespace {

using testing::HasSubstr;

constexpr int kRemoteError = 6;  // NCCL's number

TEST_F(Nccl, RowsForNobodyAreNotSent) {
  on_gpus(4, [](Communicator& comm) {
    // Rank r sends r + 1 rows of 3 to rank 2, and nothing else.
    std::vector<std::int64_t> send_rows(4), recv_rows(4);
    const std::int64_t mine = comm.rank() + 1;
    send_rows[2] = mine;
    if (comm.rank() == 2) recv_rows = {1, 2, 3, 4};
    std::vector<float> in(static_cast<std::size_t>(mine) * 3, static_cast<float>(comm.rank())),
        out(comm.rank() == 2 ? 30 : 0);
    comm.all_to_all_rows(host_view(out.data(), {static_cast<std::int64_t>(out.size()) / 3, 3}), recv_rows,
                         host_view(static_cast<const float*>(in.data()), {mine, 3}), send_rows)
        .wait();
    if (comm.rank() != 2) return;
    EXPECT_EQ(out.front(), 0.0f);
    EXPECT_EQ(out.back(), 3.0f);
  });
  std::vector<std::tuple<std::string, int, int, std::size_t>> calls;
  for (const fake_cuda::NcclCall& c : fake_cuda::take_nccl_calls())
    calls.emplace_back(c.name, c.rank, c.peer, c.bytes);
  EXPECT_THAT(calls, testing::UnorderedElementsAre(
                         std::tuple("ncclSend", 0, 2, 12), std::tuple("ncclSend", 1, 2, 24),
                         std::tuple("ncclSend", 3, 2, 48), std::tuple("ncclRecv", 2, 0, 12),
                         std::tuple("ncclRecv", 2, 1, 24), std::tuple("ncclRecv", 2, 3, 48)));
}

TEST_F(Nccl, SmallSumsAreOneCallAndLargeOnesAreCut) {
  on_gpus(4, [](Communicator& comm) {
    std::vector<float> x(16384, 1.0f);
    comm.all_reduce(view(x), ReduceOp::kSum);
    EXPECT_EQ(x, std::vector<float>(16384, 4.0f));
  });
  auto calls = of_rank_0();
  EXPECT_EQ(calls.size(), 1u);
  EXPECT_EQ(calls["ncclAllGather"], std::pair(1, std::size_t{65536}));
  on_gpus(4, [](Communicator& comm) {
    std::vector<float> x(16388, 1.0f);
    comm.all_reduce(view(x), ReduceOp::kSum);
    EXPECT_EQ(x, std::vector<float>(16388, 4.0f));
  });
  calls = of_rank_0();
  EXPECT_EQ(calls.size(), 2u);
  EXPECT_EQ(calls["ncclSend"], std::pair(6, std::size_t{6 * 4097 * 4}));
  EXPECT_EQ(calls["ncclRecv"], std::pair(6, std::size_t{6 * 4097 * 4}));
}

TEST_F(Nccl, AMessageWhereNothingIsConnected) {
  try {
    on_gpus(2, [](Communicator& comm) {
      std::vector<float> x(3);
      comm.connect({{1, 0}});
      if (comm.rank() == 0) comm.send(view(std::as_const(x)), 1);
    });
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("ranks 0 and 1 of 2 were not connected"));
  }
}

TEST_F(Nccl, AnOldNcclIsRefused) {
  fake_cuda::set_nccl_version(22505);
  try {
    on_gpus(2, [](Communicator&) {});
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kDevice);
    EXPECT_THAT(e.what(), HasSubstr("NCCL 2.25.5 keeps operations of several groups"));
  }
}

TEST_F(Nccl, ACommunicatorThatCannotBeMade) {
  for (const char* call : {"ncclGetUniqueId", "ncclCommInitRank", "ncclCommSplit"}) {
    fake_cuda::fail_next(call, 2, call == std::string("ncclGetUniqueId") ? 1 : 2);
    try {
      on_gpus(2, [](Communicator& comm) { comm.split(0, 0); });
      ADD_FAILURE() << call;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kCommunicator);
      EXPECT_THAT(e.what(), HasSubstr(std::string("NCCL 2.28.9: unhandled system error, in ") + call));
    }
  }
}

// What a call returns on one rank is thrown there, with NCCL's words.
TEST_F(Nccl, WhatACallReturnsIsThrown) {
  const std::map<std::string, std::function<void(Communicator&)>> uses{
      {"ncclGroupStart",
       [](Communicator& comm) {
         std::vector<float> in(6), out(3);
         comm.reduce_scatter(view(out), view(std::as_const(in))).wait();
       }},
      {"ncclAllGather",
       [](Communicator& comm) {
         std::vector<float> x(5);
         comm.all_reduce(view(x), ReduceOp::kSum);
       }},
      {"ncclBroadcast",
       [](Communicator& comm) {
         std::vector<float> x(5);
         comm.broadcast(view(x), 0);
       }},
  };
  for (const auto& [call, use] : uses) {
    set_nccl_error_handler([](const std::string&) {});
    try {
      on_gpus(2, [&, call = call, use = use](Communicator& comm) {
        comm.barrier();
        if (comm.rank() != 0) return comm.barrier();
        fake_cuda::fail_next(call.c_str(), 3);
        use(comm);
      });
      ADD_FAILURE() << call;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kCommunicator) << call;
      EXPECT_THAT(e.what(), HasSubstr("internal error")) << call;
      EXPECT_THAT(e.what(), HasSubstr(call));
    }
  }
}

// A rank throws while the others wait for it on their GPUs: NCCL tells them, they say so and go on no further.
TEST_F(Nccl, ADeadPeerIsToldOf) {
  std::mutex mutex;
  std::vector<std::string> told;
  set_nccl_error_handler([&](const std::string& message) {
    const std::lock_guard lock(mutex);
    told.push_back(message);
  });
  std::atomic<int> refused{0};
  try {
    on_gpus(3, [&](Communicator& comm) {
      if (comm.rank() == 1) fail(ExitCode::kNumeric, "loss is NaN");
      std::vector<float> x(100'000, 1.0f);
      const auto wait_for_refusal = [&] {
        for (int i = 0; i < 1000; ++i) comm.all_reduce(view(x), ReduceOp::kSum);
      };
      try {
        wait_for_refusal();
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ExitCode::kCommunicator);
        EXPECT_THAT(e.what(), HasSubstr("remote process exited"));
        ++refused;
        throw;
      }
    });
    ADD_FAILURE();
  } catch (const Error&) {
  }
  EXPECT_EQ(refused, 2);
  ASSERT_EQ(told.size(), 2u);
  for (const std::string& message : told) {
    EXPECT_THAT(message, HasSubstr("NCCL 2.28.9: remote process exited or there was a network error"));
    EXPECT_THAT(message, HasSubstr("between ranks 0, 1, 2"));
  }
}

// Two ranks with a channel, without what a communicator puts around it.
void on_channel_of_two(
    const std::function<void(Communicator& world, nccl::Progress&, nccl::Channel&, Stream& compute)>& body) {
  run_in_threads(2, [&](Communicator& world) {
    gpu::use(world.rank());
    nccl::Id id{};
    if (world.rank() == 0) id = nccl::new_id();
    world.broadcast(host_view(reinterpret_cast<std::int32_t*>(id.data()), {32}), 0);
    const auto progress = std::make_shared<nccl::Progress>();
    nccl::Channel channel(progress, nccl::join(id, 2, world.rank()), "0, 1");
    const auto compute = gpu::make_stream();
    body(world, *progress, channel, *compute);
  });
}

// A rank that is slow to give the parts of a verb: its channel is still there for the last of them.
TEST_F(Nccl, NoChannelIsGoneWhileItIsCalled) {
  std::atomic<bool> told{false};
  set_nccl_error_handler([&](const std::string&) { told = true; });
  on_channel_of_two([&](Communicator& world, auto& progress, auto& channel, Stream& compute) {
    if (world.rank() == 1) return progress.abort_all();
    std::byte in{}, out{};
    EXPECT_NO_THROW(channel.run("first", &compute, [&](nccl::Comm c, Stream& stream) {
      nccl::receive(c, stream, &in, 1, 1);
      while (!told) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::milliseconds(200));  // many rounds of the thread that aborts
      nccl::send(c, stream, &out, 1, 1);
    }));
    channel.stream().synchronize();  // by the abort
    for (const auto& verb : {std::function([&] { channel.run("next", &compute, [](auto, auto&) {}); }),
                             std::function([&] { channel.split(true, 0, 0); })}) {
      try {
        verb();
        ADD_FAILURE() << "nothing is thrown";
      } catch (const Error& e) {
        EXPECT_THAT(e.what(), HasSubstr("between ranks 0, 1"));
      }
    }
  });
}

// Its memory may be gone: who receives from it then meets its end, not what it was about to send.
TEST_F(Nccl, NothingIsTakenFromARankThatHasGivenUp) {
  std::atomic<bool> told{false};
  set_nccl_error_handler([&](const std::string&) { told = true; });
  on_channel_of_two(
      [&](Communicator& world, nccl::Progress& progress, nccl::Channel& channel, Stream& compute) {
        std::byte in{}, out{7};
        if (world.rank() == 0) {
          channel.run("send", &compute, [&](auto c, Stream& stream) { nccl::send(c, stream, &out, 1, 1); });
          std::this_thread::sleep_for(std::chrono::milliseconds(50));
          progress.abort_all();
          EXPECT_THROW(channel.run("next", &compute, [](auto, auto&) {}), Error);
          world.barrier();
          return;
        }
        world.barrier();
        channel.run("recv", &compute, [&](auto c, Stream& stream) { nccl::receive(c, stream, &in, 1, 0); });
        for (int i = 0; i < 1000 && !told; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
        EXPECT_TRUE(told);
        EXPECT_EQ(in, std::byte{});
      });
}

// The same, in a group of some and between two.
TEST_F(Nccl, ADeadPeerOfAGroupAndOfAPair) {
  for (const bool pair : {false, true}) {
    std::mutex mutex;
    std::string told;
    set_nccl_error_handler([&](const std::string& message) {
      const std::lock_guard lock(mutex);
      told += message + "\n";
    });
    try {
      on_gpus(4, [&](Communicator& comm) {
        std::vector<float> x(1000, 1.0f);
        const auto half = comm.split(comm.rank() % 2, comm.rank());
        half->connect({{0, 1}});
        const auto exchange = [&] {
          if (!pair) return half->all_reduce(view(x), ReduceOp::kSum);
          if (half->rank() == 0) half->send(view(std::as_const(x)), 1).wait();
          if (half->rank() == 1) half->recv(view(x), 0);
        };
        exchange();
        comm.barrier();
        if (comm.rank() == 3) fail(ExitCode::kNumeric, "loss is NaN");
        if (comm.rank() == 1)
          for (int i = 0; i < 1000; ++i) exchange();
      });
      ADD_FAILURE();
    } catch (const Error&) {
    }
    EXPECT_THAT(told, HasSubstr("between ranks 1, 3: one of them has ended")) << pair;
  }
}

TEST_F(Nccl, AbortUnblocksTheOthers) {
  std::atomic<int> told{0};
  set_nccl_error_handler([&](const std::string&) { ++told; });
  EXPECT_THROW(on_gpus(3,
                       [](Communicator& comm) {
                         std::vector<float> x(10);
                         if (comm.rank() == 0) return comm.abort(4);
                         for (int i = 0; i < 1000; ++i) comm.all_reduce(view(x), ReduceOp::kSum);
                       }),
               Error);
  EXPECT_GE(told, 1);
}

// Without a handler such an error ends the process, once, with the status of a communicator.
TEST_F(NcclDeathTest, AnErrorBetweenCallsEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(on_gpus(2,
                      [](Communicator& comm) {
                        comm.barrier();
                        if (comm.rank() == 0) fake_cuda::fail_next("async error", kRemoteError);
                        std::this_thread::sleep_for(std::chrono::seconds(20));
                      }),
              testing::ExitedWithCode(static_cast<int>(ExitCode::kCommunicator)),
              "upmoe: error: NCCL 2.28.9: remote process exited .*between ranks 0, 1: one of them has ended");
}

TEST_F(NcclDeathTest, AVerbPastItsDeadlineEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        watchdog::start(std::chrono::milliseconds(600), 0);
        on_gpus(3, [](Communicator& comm) {
          std::vector<float> x(10);
          if (comm.rank() == 2) std::this_thread::sleep_for(std::chrono::seconds(20));
          comm.all_reduce(view(x), ReduceOp::kSum);
        });
      },
      testing::ExitedWithCode(static_cast<int>(ExitCode::kCommunicator)),
      "no progress for .*the collective all_reduce .* did not finish: ranks 0, 1, 2, stuck, stopped or "
      "unreachable");
}

// A receiver that never comes: the channel of the two cannot be made.
TEST_F(NcclDeathTest, AReceiverThatNeverComes) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        watchdog::start(std::chrono::milliseconds(600), 0);
        on_gpus(2, [](Communicator& comm) {
          std::vector<float> x(10);
          if (comm.rank() == 0) comm.connect({{0, 1}});
          std::this_thread::sleep_for(std::chrono::seconds(20));
        });
      },
      testing::ExitedWithCode(static_cast<int>(ExitCode::kHang)), "making of a channel between two GPUs");
}

TEST_F(Nccl, AVerbTakesAStream) {
  on_gpus(2, [](Communicator&) {});
  run_in_threads(2, [](Communicator& world) {
    gpu::use(world.rank());
    const auto comm = make_nccl_communicator(world.split(0, world.rank()));
    const Buffer memory = Buffer::allocate({DeviceType::kCuda, world.rank()}, 64);
    EXPECT_THROW(comm->all_reduce(memory.view({4}, DType::kF32), ReduceOp::kSum), Error);
    const auto alone = comm->split(world.rank(), 0);
    EXPECT_THROW(alone->all_reduce(memory.view({4}, DType::kF32), ReduceOp::kSum), Error);
    // Tensors on the host stay there.
    std::int64_t sum = world.rank() + 1;
    comm->all_reduce(host_view(&sum, {1}), ReduceOp::kSum);
    EXPECT_EQ(sum, 3);
    EXPECT_TRUE(fake_cuda::take_nccl_calls().empty());
  });
}

}  // namespace

}  // namespace upmoe
