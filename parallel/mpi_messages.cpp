#include "parallel/mpi_messages.h"

#include <fmt/ranges.h>
#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "parallel/host.h"
#include "parallel/mpi_signs.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// Between polls a rank gives its turn away; when it has waited for kBrief, it sleeps as well, for at most a
// sixteenth of the time it has waited already. A poll that computed for longer than kIdlePoll moved data:
// then the next ones follow at once.
constexpr auto kBrief = microseconds(500), kLongestSleep = microseconds(1000), kIdlePoll = microseconds(5);
constexpr auto kPatience = std::chrono::milliseconds(200);

Clock::duration computed() {  // by this thread
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
}

// By rank of the job; empty where all are on one host.
std::vector<std::string> host_of_rank;

std::string with_hosts(const std::set<int>& ranks) {
  std::string words = fmt::format("rank {}", fmt::join(ranks, ", "));
  if (host_of_rank.empty()) return words;
  std::vector<std::string> hosts;
  for (const int rank : ranks) {
    const std::string& host = host_of_rank[static_cast<std::size_t>(rank)];
    if (std::find(hosts.begin(), hosts.end(), host) == hosts.end()) hosts.push_back(host);
  }
  constexpr std::size_t kNamed = 8;
  const bool more = hosts.size() > kNamed;
  if (more) hosts.resize(kNamed);
  return fmt::format("{} (on {}{})", words, fmt::join(hosts, ", "), more ? " and others" : "");
}

}  // namespace

void learn_hosts() {
  constexpr int kRoom = 64;
  int size = 1;
  check_mpi(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  char mine[kRoom] = {};
  host_name().copy(mine, kRoom - 1);
  std::vector<char> all(static_cast<std::size_t>(size) * kRoom);
  check_mpi(MPI_Allgather(mine, kRoom, MPI_CHAR, all.data(), kRoom, MPI_CHAR, MPI_COMM_WORLD),
            "MPI_Allgather");
  host_of_rank.clear();
  for (std::size_t at = 0; at < all.size(); at += kRoom) host_of_rank.emplace_back(all.data() + at);
  if (std::set<std::string>(host_of_rank.begin(), host_of_rank.end()).size() == 1) host_of_rank.clear();
}

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
  void look_at_peers(std::uint64_t collective, Clock::time_point began) const;
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

void MpiMessages::wait(const char* verb) {
  const watchdog::Watched watched(verb);
  std::vector<MPI_Status> statuses(impl_->requests.size());
  const auto began = Clock::now();
  auto looked = began, quiet_since = began;
  // A poll is also what moves the data of long messages: while there is something to move, polls follow each other.
  //
  //   polls   ||||||||||||||||| |  |  |   |    |      |         |            (time ->)
  //           data moves        nothing for kBrief: sleeps grow with the wait, to kLongestSleep
  for (int done = 0;;) {
    const auto before = computed();
    const int result =
        MPI_Testall(static_cast<int>(impl_->requests.size()), impl_->requests.data(), &done, statuses.data());
    // More bytes than were expected are an error of MPI's own; fewer are found by check_length below.
    if (result == MPI_ERR_IN_STATUS) impl_->report(statuses);  // throws
    check_mpi(result, "MPI_Testall");
    if (done != 0) break;
    const auto now = Clock::now();
    if (computed() - before > kIdlePoll) quiet_since = now;
    if (now - quiet_since > kBrief) {
      std::this_thread::sleep_for(std::min<Clock::duration>((now - quiet_since) / 16, kLongestSleep));
    } else {
      sched_yield();
    }
    if (now - looked < kPatience) continue;
    // Five times a second: who is waited for, and when each of them was last known to be alive.
    looked = now;
    impl_->look_at_peers(watched.sequence, began);
  }
  for (std::size_t i = 0; i < impl_->requests.size(); ++i)
    impl_->check_length(statuses[i], impl_->messages[i]);
  impl_->requests.clear();
  impl_->messages.clear();
}

void MpiMessages::Impl::look_at_peers(std::uint64_t collective, Clock::time_point began) const {
  std::set<int> silent, busy;  // in ranks of the job, whatever group this is
  for (std::size_t i = 0; i < requests.size(); ++i) {
    int done = 0;
    // Asks without completing the request: that is left to MPI_Testall, which wants them all.
    check_mpi(MPI_Request_get_status(requests[i], &done, MPI_STATUS_IGNORE), "MPI_Request_get_status");
    if (done == 0) (messages[i].sent ? busy : silent).insert(in_the_job(messages[i].peer));
  }
  if (!silent.empty()) {
    watchdog::waiting_for(collective, "nothing yet from " + with_hosts(silent));
  } else if (!busy.empty()) {
    watchdog::waiting_for(collective, "not yet taken by " + with_hosts(busy));
  }
  SignsOfLife* signs = signs_of_life();
  if (signs == nullptr) return;
  signs->take_in();
  silent.merge(busy);
  watchdog::peers_progressed(signs->oldest_sign(silent, began));
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
