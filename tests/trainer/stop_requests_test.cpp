// What signals ask of a run, between any two instructions of who takes the requests.

#include "trainer/stop_requests.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <thread>

namespace upmoe {
namespace {

// Runs body in a process of its own; its exit status, or 128 + the signal that ended it.
template <class Body>
int in_a_child(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    install_signal_handlers();
    _exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST(StopRequests, NoRequestToSaveIsLostWhileAnotherIsTaken) {
  EXPECT_EQ(in_a_child([] {
              constexpr int kRequests = 5000;
              std::atomic<int> sent = 0, taken = 0;
              std::thread sender([&] {
                for (int i = 0; i < kRequests; ++i) {
                  raise(SIGUSR1);
                  ++sent;
                  while (taken <= i) std::this_thread::yield();
                }
              });
              alarm(60);  // a lost one is waited for in vain
              while (taken < kRequests)
                if (take_requests() != 0) ++taken;
              sender.join();
              return taken == kRequests ? 0 : 1;
            }),
            0);
}

TEST(StopRequests, ARequestToStopStays) {
  EXPECT_EQ(in_a_child([] {
              raise(SIGUSR2);
              return take_requests() == kStopRequest && take_requests() == kStopRequest ? 0 : 1;
            }),
            0);
}

TEST(StopRequests, TheSameRequestTwiceInAMomentIsOneAndALaterOneEnds) {
  for (const int asked : {SIGTERM, SIGINT, SIGHUP}) {
    EXPECT_EQ(in_a_child([&] {
                raise(asked);
                raise(asked);
                return take_requests() == kStopRequest ? 0 : 1;
              }),
              0);
    EXPECT_EQ(in_a_child([&] {
                raise(asked);
                std::this_thread::sleep_for(std::chrono::milliseconds(550));
                raise(asked);
                return 0;
              }),
              128 + asked);
  }
}

TEST(StopRequests, WhatNohupIgnoresStaysIgnored) {
  std::signal(SIGHUP, SIG_IGN);
  EXPECT_EQ(in_a_child([] {
              raise(SIGHUP);
              return take_requests() == 0 ? 0 : 1;
            }),
            0);
  std::signal(SIGHUP, SIG_DFL);
}

}  // namespace
}  // namespace upmoe
