#include "parallel/mpi_messages.h"

#include <fmt/ranges.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <set>

#include "parallel/runtime.h"

namespace upmoe {

namespace {

constexpr std::uint64_t kPollsPerLook = 256;  // at the clock
constexpr auto kPatience = std::chrono::milliseconds(200);

}  // namespace

void check_mpi(int result, const char* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(result, text, &length);
  fail(ExitCode::kCommunicator, "{}: {}; a peer may have died, see its own message", call, text);
}

MPI_Request& MpiMessages::add(const Message& message) {
  messages_.push_back(message);
  requests_.push_back(MPI_REQUEST_NULL);
  return requests_.back();
}

// The last chunk is always a short one, empty if need be: whoever expects more or less notices, instead of
// taking the next verb's message for this one's.
template <class F>
void MpiMessages::for_chunks(std::size_t bytes, const F& f) const {
  for (std::size_t at = 0; at <= bytes; at += chunk_) f(at, static_cast<int>(std::min(chunk_, bytes - at)));
}

void MpiMessages::send(const std::byte* data, std::size_t bytes, int to, int tag) {
  for_chunks(bytes, [&](std::size_t at, int n) {
    check_mpi(MPI_Isend(data + at, n, MPI_BYTE, to, tag, comm_, &add({to, true, n})), "MPI_Isend");
  });
}

void MpiMessages::receive(std::byte* data, std::size_t bytes, int from, int tag) {
  for_chunks(bytes, [&](std::size_t at, int n) {
    check_mpi(MPI_Irecv(data + at, n, MPI_BYTE, from, tag, comm_, &add({from, false, n})), "MPI_Irecv");
  });
}

void MpiMessages::wait(std::uint64_t collective) {
  std::vector<MPI_Status> statuses(requests_.size());
  auto looked = std::chrono::steady_clock::now();
  std::uint64_t polls = 0;
  for (int done = 0;;) {
    const int result =
        MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done, statuses.data());
    if (result == MPI_ERR_IN_STATUS) report(statuses);  // throws
    check_mpi(result, "MPI_Testall");
    if (done != 0) break;
    sched_yield();
    if (++polls % kPollsPerLook != 0) continue;
    const auto now = std::chrono::steady_clock::now();
    if (now - looked < kPatience) continue;
    looked = now;
    watchdog::waiting_for(collective, whom_it_waits_for());
  }
  for (std::size_t i = 0; i < requests_.size(); ++i) check_length(statuses[i], messages_[i]);
  requests_.clear();
  messages_.clear();
}

// In ranks of the job, whatever group this is.
std::string MpiMessages::whom_it_waits_for() const {
  std::set<int> silent, busy;
  for (std::size_t i = 0; i < requests_.size(); ++i) {
    int done = 0;
    check_mpi(MPI_Request_get_status(requests_[i], &done, MPI_STATUS_IGNORE), "MPI_Request_get_status");
    if (done == 0) (messages_[i].sent ? busy : silent).insert(in_the_job(messages_[i].peer));
  }
  if (!silent.empty()) return fmt::format("nothing yet from rank {}", fmt::join(silent, ", "));
  if (!busy.empty()) return fmt::format("not yet taken by rank {}", fmt::join(busy, ", "));
  return {};
}

int MpiMessages::in_the_job(int rank) const {
  MPI_Group here = MPI_GROUP_NULL, job = MPI_GROUP_NULL;
  check_mpi(MPI_Comm_group(comm_, &here), "MPI_Comm_group");
  check_mpi(MPI_Comm_group(MPI_COMM_WORLD, &job), "MPI_Comm_group");
  int found = rank;
  check_mpi(MPI_Group_translate_ranks(here, 1, &rank, job, &found), "MPI_Group_translate_ranks");
  MPI_Group_free(&here);
  MPI_Group_free(&job);
  return found;
}

int MpiMessages::own_rank() const {
  int rank = 0;
  MPI_Comm_rank(comm_, &rank);
  return rank;
}

void MpiMessages::report(const std::vector<MPI_Status>& statuses) const {
  for (std::size_t i = 0; i < statuses.size(); ++i) {
    const int error = statuses[i].MPI_ERROR;
    if (error == MPI_SUCCESS || error == MPI_ERR_PENDING) continue;
    int error_class = MPI_SUCCESS;
    MPI_Error_class(error, &error_class);
    if (error_class == MPI_ERR_TRUNCATE)
      fail(ExitCode::kCommunicator,
           "rank {} of the group sent more than the {} bytes that rank {} expected: the ranks disagree",
           messages_[i].peer, messages_[i].bytes, own_rank());
    check_mpi(error, messages_[i].sent ? "sending" : "receiving");
  }
}

void MpiMessages::check_length(MPI_Status& status, const Message& m) const {
  if (m.sent) return;
  int found = 0;
  check_mpi(MPI_Get_count(&status, MPI_BYTE, &found), "MPI_Get_count");
  if (found != m.bytes)
    fail(ExitCode::kCommunicator,
         "rank {} of the group sent {} bytes where rank {} expected {}: the ranks disagree", m.peer, found,
         own_rank(), m.bytes);
}

}  // namespace upmoe
