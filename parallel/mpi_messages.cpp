#include "parallel/mpi_messages.h"

#include <fmt/ranges.h>
#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <string>
#include <vector>

#include "parallel/watchdog.h"

namespace upmoe {

namespace {

// Polls between looks at the clock: few, because on a host that runs more than it has cores for each gives
// its turn away.
constexpr std::uint64_t kPollsPerLook = 16;
constexpr auto kPatience = std::chrono::milliseconds(200);

}  // namespace

void check_mpi(int result, const char* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(result, text, &length);
  fail(ExitCode::kCommunicator, "{}: {}; a peer may have died, see its own message", call, text);
}

struct MpiMessages::Impl {
  struct Message {
    int peer;
    bool sent;
    int bytes;
  };

  MPI_Request& add(const Message& message);
  template <class F>
  void for_chunks(std::size_t bytes, const F& f) const;
  std::string whom_it_waits_for() const;
  int in_the_job(int rank) const;
  int own_rank() const;
  void report(const std::vector<MPI_Status>& statuses) const;
  void check_length(MPI_Status& status, const Message& message) const;

  MPI_Comm comm;
  std::size_t chunk;
  std::vector<MPI_Request> requests;
  std::vector<Message> messages;
};

MpiMessages::MpiMessages(const void* mpi_comm, std::size_t chunk)
    : impl_(new Impl{*static_cast<const MPI_Comm*>(mpi_comm), chunk, {}, {}}) {}
MpiMessages::MpiMessages(MpiMessages&&) noexcept = default;
MpiMessages::~MpiMessages() = default;

MPI_Request& MpiMessages::Impl::add(const Message& message) {
  messages.push_back(message);
  requests.push_back(MPI_REQUEST_NULL);
  return requests.back();
}

// The last chunk is always a short one, empty if need be: whoever expects more or less notices, instead of
// taking the next verb's message for this one's.
template <class F>
void MpiMessages::Impl::for_chunks(std::size_t bytes, const F& f) const {
  for (std::size_t at = 0; at <= bytes; at += chunk) f(at, static_cast<int>(std::min(chunk, bytes - at)));
}

void MpiMessages::send(const std::byte* data, std::size_t bytes, int to, int tag) {
  impl_->for_chunks(bytes, [&](std::size_t at, int n) {
    check_mpi(MPI_Isend(data + at, n, MPI_BYTE, to, tag, impl_->comm, &impl_->add({to, true, n})),
              "MPI_Isend");
  });
}

void MpiMessages::receive(std::byte* data, std::size_t bytes, int from, int tag) {
  impl_->for_chunks(bytes, [&](std::size_t at, int n) {
    check_mpi(MPI_Irecv(data + at, n, MPI_BYTE, from, tag, impl_->comm, &impl_->add({from, false, n})),
              "MPI_Irecv");
  });
}

void MpiMessages::wait(std::uint64_t collective) {
  std::vector<MPI_Status> statuses(impl_->requests.size());
  auto looked = std::chrono::steady_clock::now();
  std::uint64_t polls = 0;
  for (int done = 0;;) {
    const int result =
        MPI_Testall(static_cast<int>(impl_->requests.size()), impl_->requests.data(), &done, statuses.data());
    if (result == MPI_ERR_IN_STATUS) impl_->report(statuses);  // throws
    check_mpi(result, "MPI_Testall");
    if (done != 0) break;
    sched_yield();
    if (++polls % kPollsPerLook != 0) continue;
    const auto now = std::chrono::steady_clock::now();
    if (now - looked < kPatience) continue;
    looked = now;
    watchdog::waiting_for(collective, impl_->whom_it_waits_for());
  }
  for (std::size_t i = 0; i < impl_->requests.size(); ++i)
    impl_->check_length(statuses[i], impl_->messages[i]);
  impl_->requests.clear();
  impl_->messages.clear();
}

// In ranks of the job, whatever group this is.
std::string MpiMessages::Impl::whom_it_waits_for() const {
  std::set<int> silent, busy;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    int done = 0;
    check_mpi(MPI_Request_get_status(requests[i], &done, MPI_STATUS_IGNORE), "MPI_Request_get_status");
    if (done == 0) (messages[i].sent ? busy : silent).insert(in_the_job(messages[i].peer));
  }
  if (!silent.empty()) return fmt::format("nothing yet from rank {}", fmt::join(silent, ", "));
  if (!busy.empty()) return fmt::format("not yet taken by rank {}", fmt::join(busy, ", "));
  return {};
}

int MpiMessages::Impl::in_the_job(int rank) const {
  MPI_Group here = MPI_GROUP_NULL, job = MPI_GROUP_NULL;
  check_mpi(MPI_Comm_group(comm, &here), "MPI_Comm_group");
  check_mpi(MPI_Comm_group(MPI_COMM_WORLD, &job), "MPI_Comm_group");
  int found = rank;
  check_mpi(MPI_Group_translate_ranks(here, 1, &rank, job, &found), "MPI_Group_translate_ranks");
  MPI_Group_free(&here);
  MPI_Group_free(&job);
  return found;
}

int MpiMessages::Impl::own_rank() const {
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  return rank;
}

void MpiMessages::Impl::report(const std::vector<MPI_Status>& statuses) const {
  for (std::size_t i = 0; i < statuses.size(); ++i) {
    const int error = statuses[i].MPI_ERROR;
    if (error == MPI_SUCCESS || error == MPI_ERR_PENDING) continue;
    int error_class = MPI_SUCCESS;
    MPI_Error_class(error, &error_class);
    if (error_class == MPI_ERR_TRUNCATE)
      fail(ExitCode::kCommunicator,
           "rank {} of the group sent more than the {} bytes that rank {} expected: the ranks disagree",
           messages[i].peer, messages[i].bytes, own_rank());
    check_mpi(error, messages[i].sent ? "sending" : "receiving");
  }
}

void MpiMessages::Impl::check_length(MPI_Status& status, const Message& m) const {
  if (m.sent) return;
  int found = 0;
  check_mpi(MPI_Get_count(&status, MPI_BYTE, &found), "MPI_Get_count");
  if (found != m.bytes)
    fail(ExitCode::kCommunicator,
         "rank {} of the group sent {} bytes where rank {} expected {}: the ranks disagree", m.peer, found,
         own_rank(), m.bytes);
}

}  // namespace upmoe
