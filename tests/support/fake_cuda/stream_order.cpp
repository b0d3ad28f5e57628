#include "tests/support/fake_cuda/stream_order.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <set>

namespace fake_cuda {

namespace {

using Clock = std::map<const void*, std::uint64_t>;  // of each stream, how much of its work lies before

void merge(Clock& into, const Clock& from) {
  for (const auto& [stream, tick] : from) into[stream] = std::max(into[stream], tick);
}

struct Access {
  std::uintptr_t begin, end;
  bool writes;
  const void* stream;
  std::uint64_t tick;
  std::string who;
};

struct Watch {
  std::map<const void*, Clock> streams, events;
  std::vector<Access> accesses;
  std::set<const void*> seen;
  std::vector<std::string> mistakes;
  std::size_t count = 0;
};

std::mutex mutex;
std::optional<Watch> watch;
std::atomic<std::uint64_t> generation{0};  // even: nobody watches

// What the calling thread has waited for, of this watch.
Clock& host_clock() {
  thread_local std::uint64_t of = 0;
  thread_local Clock clock;
  if (const std::uint64_t now = generation; of != now) {
    of = now;
    clock.clear();
  }
  return clock;
}

bool orders(const Clock& clock, const Access& before) {
  const auto it = clock.find(before.stream);
  return it != clock.end() && it->second >= before.tick;
}

std::string words(const Access& a) {
  return a.who + (a.writes ? " writes " : " reads ") + std::to_string(a.end - a.begin) + " bytes";
}

void add(Watch& w, const Clock& clock, Access a) {
  for (const Access& b : w.accesses)
    if (a.begin < b.end && b.begin < a.end && (a.writes || b.writes) && !orders(clock, b) &&
        w.mistakes.size() < 20)
      w.mistakes.push_back(words(a) + " on one stream; nothing orders it behind another one, on which " +
                           words(b) + " of the same memory");
  // Who is ordered behind this one is ordered behind what it covers.
  std::erase_if(w.accesses, [&](const Access& b) {
    return a.begin <= b.begin && b.end <= a.end && (a.writes || !b.writes) && orders(clock, b);
  });
  w.accesses.push_back(std::move(a));
}

}  // namespace

StreamOrder::StreamOrder() {
  const std::lock_guard lock(mutex);
  if (watch) std::fputs("stream_order: two at a time\n", stderr), std::abort();
  watch.emplace();
  ++generation;
}
StreamOrder::~StreamOrder() {
  const std::lock_guard lock(mutex);
  watch.reset();
  ++generation;
}
std::vector<std::string> StreamOrder::mistakes() const {
  const std::lock_guard lock(mutex);
  return watch->mistakes;
}
std::size_t StreamOrder::accesses() const {
  const std::lock_guard lock(mutex);
  return watch->count;
}
std::size_t StreamOrder::streams() const {
  const std::lock_guard lock(mutex);
  return watch->seen.size();
}

bool is_watched() {
  return generation % 2 != 0;
}

void touched(const void* stream, const std::string& who, const Ranges& reads, const Ranges& writes) {
  if (!is_watched() || stream == nullptr) return;
  const Clock& host = host_clock();
  const std::lock_guard lock(mutex);
  if (!watch) return;
  Clock& clock = watch->streams[stream];
  merge(clock, host);
  const std::uint64_t tick = ++clock[stream];
  watch->seen.insert(stream);
  for (const bool writing : {false, true})
    for (const Range& r : writing ? writes : reads) {
      if (r.data == nullptr || r.bytes == 0) continue;
      ++watch->count;
      const auto begin = reinterpret_cast<std::uintptr_t>(r.data);
      add(*watch, clock, {begin, begin + r.bytes, writing, stream, tick, who});
    }
}

void recorded(const void* event, const void* stream) {
  if (!is_watched()) return;
  const Clock& host = host_clock();
  const std::lock_guard lock(mutex);
  if (!watch) return;
  merge(watch->streams[stream], host);
  watch->events[event] = watch->streams[stream];
}

void held(const void* stream, const void* event) {
  if (!is_watched()) return;
  const std::lock_guard lock(mutex);
  if (watch) merge(watch->streams[stream], watch->events[event]);
}

void host_waited_for_stream(const void* stream) {
  if (!is_watched()) return;
  Clock& host = host_clock();
  const std::lock_guard lock(mutex);
  if (watch) merge(host, watch->streams[stream]);
}

void host_waited_for_event(const void* event) {
  if (!is_watched()) return;
  Clock& host = host_clock();
  const std::lock_guard lock(mutex);
  if (watch) merge(host, watch->events[event]);
}

void forgotten(Range memory) {
  if (!is_watched()) return;
  const std::lock_guard lock(mutex);
  if (!watch) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.data), end = begin + memory.bytes;
  std::erase_if(watch->accesses, [&](const Access& a) { return begin < a.end && a.begin < end; });
}

}  // namespace fake_cuda
