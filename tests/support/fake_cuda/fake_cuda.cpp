#include "tests/support/fake_cuda/fake_cuda.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <random>
#include <set>
#include <thread>

#include "tests/support/fake_cuda/fake_world.h"

using fake_cuda::planted;
using fake_cuda::world;

namespace {

thread_local int current_device = 0;

struct Moment {  // an event as it was recorded
  std::mutex mutex;
  std::condition_variable changed;
  bool passed = false;
  std::chrono::steady_clock::time_point time;
  void pass() {
    const std::lock_guard lock(mutex);
    passed = true;
    time = std::chrono::steady_clock::now();
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return passed; });
  }
  bool has_passed() {
    const std::lock_guard lock(mutex);
    return passed;
  }
  std::chrono::steady_clock::time_point when() {
    const std::lock_guard lock(mutex);
    return time;
  }
};

}  // namespace

struct FakeEvent {
  bool timed = false;
  std::mutex mutex;
  std::shared_ptr<Moment> moment;  // null: never recorded
  std::shared_ptr<Moment> last() {
    const std::lock_guard lock(mutex);
    return moment;
  }
};

namespace {
std::mutex streams_mutex;
std::set<FakeStream*> streams;
}  // namespace

struct FakeStream {
  FakeStream() : device(current_device), thread([this] { work(); }) {
    const std::lock_guard lock(streams_mutex);
    streams.insert(this);
  }
  ~FakeStream() {
    {
      const std::lock_guard lock(streams_mutex);
      streams.erase(this);
    }
    {
      const std::lock_guard lock(mutex);
      stop = true;
      changed.notify_all();
    }
    thread.join();
  }
  void add(std::function<void()> piece) {
    const std::lock_guard lock(mutex);
    queue.push_back(std::move(piece));
    ++given;
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    const std::uint64_t until = given;
    changed.wait(lock, [&] { return done >= until; });
  }
  const int device;
  bool idle() {
    const std::lock_guard lock(mutex);
    return done == given;
  }

 private:
  void work() {
    std::mt19937_64 random(reinterpret_cast<std::uintptr_t>(this));
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [&] { return stop || !queue.empty(); });
      if (queue.empty()) return;
      const std::function<void()> piece = std::move(queue.front());
      queue.pop_front();
      lock.unlock();
      if (const std::uint64_t seed = world().delays; seed != 0 && (random() ^ seed) % 4 == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
      piece();
      lock.lock();
      ++done;
      changed.notify_all();
    }
  }
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  std::uint64_t given = 0, done = 0;
  bool stop = false;
  std::thread thread;
};

namespace fake_cuda {

void set_devices(int count, int major, int minor) {
  world().devices = count;
  world().major = major;
  world().minor = minor;
}
void set_memory(std::size_t bytes) {
  world().memory = bytes;
}
std::size_t allocated() {
  const std::lock_guard lock(world().mutex);
  return world().used;
}
void set_delays(std::uint64_t seed) {
  world().delays = seed;
}
int host_waits() {
  return waits_of_thread;
}
void fail_next(const char* call, int error, int times) {
  const std::lock_guard lock(world().mutex);
  world().failures[call] = {error, times};
}
void enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr) return work();
  stream->add(std::move(work));
}

}  // namespace fake_cuda

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "invalid argument";
  }
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  if (world().devices < 0) return cudaErrorInsufficientDriver;
  *count = world().devices;
  return world().devices == 0 ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= world().devices) return cudaErrorInvalidValue;
  current_device = device;
  return planted("cudaSetDevice");
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 4
           : attribute == cudaDevAttrComputeCapabilityMajor ? world().major
                                                            : world().minor;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = world().devices < 0 ? 0 : 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= world().devices) return cudaErrorInvalidValue;
  *p = {"pretended GPU", world().memory, world().major, world().minor, 4, device, 0, 0};
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new FakeStream;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ++fake_cuda::waits_of_thread;
  if (stream != nullptr) stream->wait();
  fake_cuda::host_waited_for_stream(stream);
  return planted("cudaStreamSynchronize");
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (const cudaError_t e = planted("cudaStreamQuery"); e != cudaSuccess) return e;
  if (stream != nullptr && !stream->idle()) return cudaErrorNotReady;
  fake_cuda::host_waited_for_stream(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (planted("forget a wait") != cudaSuccess) return cudaSuccess;  // a mistake, for the tests of the watch
  fake_cuda::held(stream, event);
  if (const std::shared_ptr<Moment> moment = event->last(); moment != nullptr)
    fake_cuda::enqueue(stream, [moment] { moment->wait(); });
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ++fake_cuda::waits_of_thread;
  std::vector<FakeStream*> mine;
  {
    const std::lock_guard lock(streams_mutex);
    for (FakeStream* s : streams)
      if (s->device == current_device) mine.push_back(s);
  }
  for (FakeStream* s : mine) {
    s->wait();
    fake_cuda::host_waited_for_stream(s);
  }
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new FakeEvent;
  (*event)->timed = flags == cudaEventDefault;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  auto moment = std::make_shared<Moment>();
  {
    const std::lock_guard lock(event->mutex);
    event->moment = moment;
  }
  fake_cuda::recorded(event, stream);
  fake_cuda::enqueue(stream, [moment] { moment->pass(); });
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::shared_ptr<Moment> moment = event->last();
  if (moment != nullptr && !moment->has_passed()) return cudaErrorNotReady;
  fake_cuda::host_waited_for_event(event);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  const std::shared_ptr<Moment> begin = from->last(), end = to->last();
  if (!from->timed || !to->timed || begin == nullptr || end == nullptr) return cudaErrorInvalidValue;
  if (!begin->has_passed() || !end->has_passed()) return cudaErrorNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(end->when() - begin->when()).count();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ++fake_cuda::waits_of_thread;
  if (const std::shared_ptr<Moment> moment = event->last(); moment != nullptr) moment->wait();
  fake_cuda::host_waited_for_event(event);
  return cudaSuccess;
}
