#include "parallel/nccl_channel.h"

#include <nccl.h>
#include <unistd.h>

#include <csignal>
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

void Progress::require_sound() {
  const std::lock_guard lock(mutex_);
  if (!failure_.empty()) throw Error(ExitCode::kCommunicator, failure_);
}

void Progress::abort_all() noexcept {
  const std::lock_guard lock(mutex_);
  abort_locked();
}

void Progress::abort_locked() noexcept {
  for (const auto& [comm, ranks] : comms_) ncclCommAbort(comm);
  comms_.clear();
}

void Progress::watch() {
  std::unique_lock lock(mutex_);
  try {
    gpu::use(device_);
    while (!stop_) {
      // Events are polled: a callback on the stream may not call CUDA, and would be one more launch for every verb.
      changed_.wait_for(lock, under_way_.empty() ? milliseconds(50) : milliseconds(2));
      retire();
      // It was told once, by a handler that let the process live; finished verbs are retired still.
      if (!failure_.empty()) continue;
      failure_ = find_error();
      if (failure_.empty()) continue;
      tell(failure_);
      abort_locked();
    }
  } catch (const Error& e) {  // of the device; the rank's own thread meets it as well, if it still can
    failure_ = e.what();
    tell(failure_);
    abort_locked();
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
  progress_->require_sound();
  const std::uint64_t sequence = watchdog::enter(verb, ExitCode::kCommunicator);
  watchdog::waiting_for(sequence, "ranks " + ranks_);
  ready_.record(*compute);
  ready_.hold(*stream_);
  calls(comm_, *stream_);
  auto done = std::make_shared<gpu::Event>();
  done->record(*stream_);
  progress_->track(sequence, done);
  return Pending([done, compute] { done->hold(*compute); });
}

struct Pair::State {
  std::shared_ptr<Progress> progress;
  Id id;
  int me;
  std::string ranks;

  struct Operation {
    std::uint64_t sequence;
    std::shared_ptr<gpu::Event> ready, done;
    Calls calls;
    std::promise<void> handed_over;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Operation> queue;
  bool stop = false, abandoned = false;
};

Pair::Pair(std::shared_ptr<Progress> progress, const Id& id, int me, const std::string& ranks)
    : state_(std::make_shared<State>()) {
  state_->progress = std::move(progress);
  state_->id = id;
  state_->me = me;
  state_->ranks = ranks;
  thread_ = std::thread([state = state_] { work(state); });
}

Pair::~Pair() {
  const bool abandoned = std::uncaught_exceptions() > 0;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
    state_->abandoned = abandoned;
    state_->changed.notify_all();
  }
  // The peer may never come to make the communicator; the process is about to end.
  if (abandoned) {
    thread_.detach();
  } else {
    thread_.join();
  }
}

Pending Pair::run(const char* verb, Stream* compute, Calls calls) {
  state_->progress->require_sound();
  State::Operation o;
  o.sequence = watchdog::enter(verb, ExitCode::kCommunicator);
  watchdog::waiting_for(o.sequence, "ranks " + state_->ranks);
  o.ready = std::make_shared<gpu::Event>();
  o.done = std::make_shared<gpu::Event>();
  o.ready->record(*compute);
  o.calls = std::move(calls);
  // The host waits only until the pair's thread has put the operation on its stream: before that there is no event to
  // hold `compute` by. The first operation of a pair waits here for the peer, which has to make the channel too.
  Pending pending([done = o.done, compute, over = o.handed_over.get_future().share()] {
    over.get();
    done->hold(*compute);
  });
  const std::lock_guard lock(state_->mutex);
  state_->queue.push_back(std::move(o));
  state_->changed.notify_all();
  return pending;
}

void Pair::work(const std::shared_ptr<State>& state) {
  State& s = *state;
  std::unique_ptr<Channel> channel;
  for (;;) {
    State::Operation o;
    {
      std::unique_lock lock(s.mutex);
      s.changed.wait(lock, [&] { return s.stop || !s.queue.empty(); });
      // remove() says whether it is still there: of two that abort a communicator the second would find it freed.
      if (s.abandoned && channel != nullptr && s.progress->remove(channel->comm()))
        ncclCommAbort(channel->comm());
      if (s.abandoned || s.queue.empty()) return;
      o = std::move(s.queue.front());
      s.queue.pop_front();
    }
    try {
      if (channel == nullptr) {
        gpu::use(s.progress->device());
        channel = std::make_unique<Channel>(s.progress, join(s.id, 2, s.me), s.ranks);
      }
      o.ready->hold(channel->stream());
      o.calls(channel->comm(), channel->stream());
      o.done->record(channel->stream());
      s.progress->track(o.sequence, o.done);
      o.handed_over.set_value();
    } catch (...) {
      watchdog::leave(o.sequence);
      // Thrown by the Pending's wait(), on the rank's own thread.
      o.handed_over.set_exception(std::current_exception());
    }
  }
}

}  // namespace upmoe::nccl
