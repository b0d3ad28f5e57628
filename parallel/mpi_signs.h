#pragma once
// Signs of life between the ranks of an MPI job: a rank that works for long without a collective tells the
// others, who would take it for stopped. For mpi_comm.cpp and mpi_messages.cpp alone; the rank's own thread.

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

namespace upmoe {

// A sign says that the rank it comes from is not to be waited for in vain, because rank `origin` made
// progress for the count-th time: the sender itself, or a rank that the sender waits for. Each is believed
// once from each sender, so in a ring of ranks that wait for each other the signs run out.
class SignsOfLife {
 public:
  using Clock = std::chrono::steady_clock;
  SignsOfLife();  // collective over MPI_COMM_WORLD
  ~SignsOfLife();
  SignsOfLife(const SignsOfLife&) = delete;

  void tell();     // all others: this rank makes progress
  void take_in();  // what the others told so far
  // This rank waits for `ranks`, since `since`: the time at which all of them had shown life (at least
  // `since`). What is new in that is passed on to those who wait for this rank.
  Clock::time_point oldest_sign(const std::set<int>& ranks, Clock::time_point since);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Of this process, from start_mpi() to stop_mpi(); null outside.
SignsOfLife* signs_of_life();

}  // namespace upmoe
