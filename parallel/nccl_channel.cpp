#include "parallel/nccl_channel.h"

#include <nccl.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>

#include "kernels/core/log.h"
#include "parallel/nccl_comm.h"
#include "parallel/watchdog.h"

namespace upmoe {

namespace {

std::function<void(const std::string&)>& error_handler() {
  static std::function<void(const std::string&)> handler;
  return handler;
}

}  // namespace

void set_nccl_error_handler(std::function<void(const std::string&)> handler) {
  error_handler() = std::move(handler);
}

std::string nccl_library() {
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess) return "does not tell its version";
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

}  // namespace upmoe

namespace upmoe::nccl {

namespace {

using std::chrono::milliseconds;

std::string words_of(ncclResult_t result) {
  const char* last = ncclGetLastError(nullptr);
  int version = 0;
  ncclGetVersion(&version);
  std::string text = fmt::format("NCCL {}.{}.{}: {}", version / 10000, version / 100 % 100, version % 100,
                                 ncclGetErrorString(result));
  if (last != nullptr && *last != '\0') text += fmt::format(" ({})", last);
  return text;
}

// The message of an error that no call returned. Mostly a peer ended because of an error of its own: it is the one
// to speak, and its end is everybody's within a second or two, by a signal that is no request to save any more.
void tell(const std::string& message) {
  if (error_handler()) return error_handler()(message);
  std::signal(SIGTERM, SIG_DFL);
  std::this_thread::sleep_for(std::chrono::seconds(3));
  const std::string text = fmt::format("{}upmoe: error: {}\n", log::timestamp(), message);
  (void)!write(2, text.data(), text.size());
  _exit(static_cast<int>(ExitCode::kCommunicator));
}

void check(ncclResult_t result, const char* call) {
  if (result == ncclSuccess || result == ncclInProgress) return;
  fail(ExitCode::kCommunicator, "{}, in {}; NCCL_DEBUG=INFO shows more", words_of(result), call);
}

cudaStream_t cuda(Stream& stream) {
  return static_cast<cudaStream_t>(gpu::raw(stream));
}

}  // namespace

void begin() {
  constexpr int kOrdered = 22600;
  static std::once_flag once;
  std::call_once(once, [] { setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 0); });
  int version = 0;
  check(ncclGetVersion(&version), "ncclGetVersion");
  if (version < kOrdered)
    fail(ExitCode::kDevice,
         "NCCL {} keeps operations of several groups of ranks in no order, so "
         "that they may wait for each other for ever: install NCCL 2.26 or newer",
         nccl_library());
}

Id new_id() {
  ncclUniqueId made;
  check(ncclGetUniqueId(&made), "ncclGetUniqueId");
  Id id;
  static_assert(sizeof made.internal == sizeof id);
  std::memcpy(id.data(), made.internal, sizeof id);
  return id;
}

Comm join(const Id& id, int ranks, int rank) {
  ncclUniqueId raw;
  std::memcpy(raw.internal, id.data(), sizeof id);
  Comm comm = nullptr;
  check(ncclCommInitRank(&comm, ranks, raw, rank), "ncclCommInitRank");
  return comm;
}

Comm split(Comm parent, bool alone, int color, int key) {
  Comm comm = nullptr;
  check(ncclCommSplit(parent, alone ? NCCL_SPLIT_NOCOLOR : color, key, &comm, nullptr), "ncclCommSplit");
  return comm;
}

void send(Comm comm, Stream& stream, const std::byte* data, std::size_t bytes, int to) {
  if (bytes > 0) check(ncclSend(data, bytes, ncclInt8, to, comm, cuda(stream)), "ncclSend");
}

void receive(Comm comm, Stream& stream, std::byte* data, std::size_t bytes, int from) {
  if (bytes > 0) check(ncclRecv(data, bytes, ncclInt8, from, comm, cuda(stream)), "ncclRecv");
}

void gather(Comm comm, Stream& stream, std::byte* out, const std::byte* data, std::size_t bytes) {
  if (bytes > 0) check(ncclAllGather(data, out, bytes, ncclInt8, comm, cuda(stream)), "ncclAllGather");
}

void broadcast(Comm comm, Stream& stream, std::byte* data, std::size_t bytes, int root) {
  if (bytes > 0) check(ncclBroadcast(data, data, bytes, ncclInt8, root, comm, cuda(stream)), "ncclBroadcast");
}

Group::Group() {
  check(ncclGroupStart(), "ncclGroupStart");
}

Group::~Group() {
  if (open_) ncclGroupEnd();
}

void Group::end() {
  open_ = false;
  check(ncclGroupEnd(), "ncclGroupEnd");
}

Progress::Progress() : device_(gpu::current()) {
  thread_ = std::thread([this] { watch(); });
}

Progress::~Progress() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  thread_.join();
  for (const Operation& o : under_way_) watchdog::leave(o.sequence);
}

void Progress::add(Comm comm, const std::string& ranks) {
  const std::lock_guard lock(mutex_);
  comms_[comm] = ranks;
}

bool Progress::remove(Comm comm) {
  const std::lock_guard lock(mutex_);
  return comms_.erase(comm) > 0;
}

void Progress::track(std::uint64_t sequence, std::shared_ptr<gpu::Event> done) {
  const std::lock_guard lock(mutex_);
  under_way_.push_back({sequence, std::move(done)});
  if (under_way_.size() == 1) changed_.notify_all();
}

void Progress::while_sound(const std::function<void()>& calls) {
  const std::lock_guard calling(calling_);
  {
    const std::lock_guard lock(mutex_);
    if (!failure_.empty()) throw Error(ExitCode::kCommunicator, failure_);
  }
  calls();
}

void Progress::abort_all() noexcept {
  const std::scoped_lock lock(calling_, mutex_);
  if (failure_.empty()) failure_ = "this rank has given up its channels";
  abort_locked();
}

void Progress::abort_locked() noexcept {
  for (const auto& [comm, ranks] : comms_) ncclCommAbort(comm);
  comms_.clear();
}

void Progress::watch() {
  std::unique_lock lock(mutex_);
  const auto find = [&] {
    try {
      gpu::use(device_);
      retire();
      return failure_.empty() ? find_error() : std::string();
    } catch (const Error& e) {  // of the device; the rank's own thread meets it as well, if it still can
      return std::string(e.what());
    }
  };
  while (!stop_) {
    // Events are polled: a callback on the stream may not call CUDA, and would be one more launch for every verb.
    changed_.wait_for(lock, under_way_.empty() ? milliseconds(50) : milliseconds(2));
    if (const std::string found = find(); failure_.empty() && !found.empty()) {
      failure_ = found;
      tell(failure_);
    }
    if (failure_.empty()) continue;
    // It was told once, by a handler that let the process live. Finished verbs are retired still.
    if (const std::unique_lock calling(calling_, std::try_to_lock); calling.owns_lock()) abort_locked();
  }
}

void Progress::retire() {
  for (auto it = under_way_.begin(); it != under_way_.end();) {
    if (!it->done->has_passed()) {
      ++it;
      continue;
    }
    watchdog::leave(it->sequence);
    it = under_way_.erase(it);
  }
}

std::string Progress::find_error() {
  for (const auto& [comm, ranks] : comms_) {
    ncclResult_t found = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(comm, &found);
    // The first is an error of asking, the second what NCCL's own threads met since the last call.
    const ncclResult_t error = asked != ncclSuccess ? asked : found;
    if (error != ncclSuccess && error != ncclInProgress)
      return fmt::format("{}, between ranks {}: one of them has ended or cannot be reached", words_of(error),
                         ranks);
  }
  return {};
}

Channel::Channel(std::shared_ptr<Progress> progress, Comm comm, std::string ranks)
    : progress_(std::move(progress)), comm_(comm), ranks_(std::move(ranks)), stream_(gpu::make_stream()) {
  progress_->add(comm_, ranks_);
}

// An orderly end waits for the peers; behind an error they may be gone.
Channel::~Channel() {
  if (!progress_->remove(comm_)) return;
  if (std::uncaught_exceptions() > 0) {
    ncclCommAbort(comm_);
  } else {
    ncclCommDestroy(comm_);
  }
}

// Two streams and two events; the host waits for nothing:
//
//   compute   ... in is made  --ready-->                          (goes on)  ... wait(): held here --> out is used
//   channel                             held - the verb's calls --done-->
//
// The verb is under way until `done` has passed, which the thread of Progress sees and tells the watchdog.
Pending Channel::run(const char* verb, Stream* compute, const Calls& calls) {
  auto done = std::make_shared<gpu::Event>();
  progress_->while_sound([&] {
    const std::uint64_t sequence = watchdog::enter(verb, ExitCode::kCommunicator);
    watchdog::waiting_for(sequence, "ranks " + ranks_);
    ready_.record(*compute);
    ready_.hold(*stream_);
    calls(comm_, *stream_);
    done->record(*stream_);
    progress_->track(sequence, done);
  });
  return Pending([done, compute] { done->hold(*compute); });
}

Comm Channel::split(bool alone, int color, int key) {
  stream_->synchronize();
  Comm child = nullptr;
  progress_->while_sound([&] { child = nccl::split(comm_, alone, color, key); });
  return child;
}

}  // namespace upmoe::nccl
