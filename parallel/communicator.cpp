#include "parallel/communicator.h"

#include <fmt/ranges.h>

#include "kernels/core/philox.h"
#include "kernels/core/system_error.h"

namespace upmoe {

Pending& Pending::operator=(Pending&& o) noexcept {
  if (this != &o) {
    if (wait_) wait_();
    wait_ = std::move(o.wait_);
    o.wait_ = nullptr;
  }
  return *this;
}

Pending::~Pending() {
  if (!wait_) return;
  try {
    wait_();
  } catch (const std::exception&) {  // dropped while another error unwinds: that one is reported
  }
}

void Pending::wait() {
  if (!wait_) return;
  const std::function<void()> wait = std::move(wait_);
  wait_ = nullptr;
  wait();
}

std::unique_ptr<Communicator> Communicator::subgroup(const std::vector<int>& members) {
  UPMOE_CHECK(!members.empty(), "an empty group");
  return split(members.front(), rank());  // disjoint groups have different first members
}

void agree(Communicator& comm, ExitCode code, const std::string& local_error) {
  // One message for one fault: of the ranks that met an error the lowest one keeps its own.
  std::int32_t speaker = local_error.empty() ? comm.size() : comm.rank();
  comm.all_reduce(host_view(&speaker, {1}), ReduceOp::kMin);
  if (speaker == comm.size()) return;
  auto agreed = static_cast<std::int32_t>(code);
  comm.broadcast(host_view(&agreed, {1}), speaker);
  if (comm.rank() == speaker) throw Error(code, local_error);
  throw PeerError(static_cast<ExitCode>(agreed), "");
}

void require_equal(Communicator& comm, const std::string& what, const std::string& value) {
  const auto mine = static_cast<std::int64_t>(philox_key(0, value));
  std::vector<std::int64_t> all(static_cast<std::size_t>(comm.size()));
  comm.all_gather(host_view(all.data(), {comm.size()}), host_view(&mine, {1})).wait();
  std::vector<int> others;
  for (int r = 0; r < comm.size(); ++r)
    if (all[static_cast<std::size_t>(r)] != all[0]) others.push_back(r);
  if (others.empty()) return;
  constexpr std::size_t kNamed = 16;
  const bool more = others.size() > kNamed;
  if (more) others.resize(kNamed);
  const std::string message = fmt::format(
      "the ranks were started with different {}: rank 0 differs from rank {}{}; start all of them with "
      "the same program, files and arguments",
      what, fmt::join(others, ", "), more ? " and others" : "");
  agree(comm, ExitCode::kUsage, comm.rank() == 0 ? message : "");
}

void run_agreed(Communicator& comm, const std::function<void()>& body) {
  std::string message;
  ExitCode code = ExitCode::kFailure;
  const auto words = [](const char* what) { return *what == 0 ? "an error without a message" : what; };
  try {
    with_system_errors(body);
  } catch (const PeerError&) {
    throw;  // an inner agreement: every rank has it already
  } catch (const Error& e) {
    message = words(e.what());
    code = e.code();
  } catch (const std::exception& e) {
    message = words(e.what());
  }
  agree(comm, code, message);
}

}  // namespace upmoe
