#pragma once
// Who touched which memory of the pretended GPUs, and what orders them: streams, events and the host's waits,
// as vector clocks. Two who touch the same bytes, one of them writing, are a mistake when nothing orders
// them, whatever happened this time.
//
// Seen are copies, products, attention and NCCL's messages in full; of a kernel the first byte behind every pointer
// among its arguments (what it writes unless it is to const), and behind every pointer to a GPU's memory that stands in
// a struct or a function object among them (as read); and what a test says itself, say of ops (OpWatcher).

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fake_cuda {

struct Range {
  const void* data;
  std::size_t bytes;
};
using Ranges = std::vector<Range>;

// While one lives, everything is watched; one at a time.
class StreamOrder {
 public:
  StreamOrder();
  ~StreamOrder();
  StreamOrder(const StreamOrder&) = delete;
  std::vector<std::string> mistakes() const;  // the first twenty
  std::size_t accesses() const;
  std::size_t streams() const;  // that touched something
};

// What the pretended libraries and the tests report. They cost nothing while nobody watches.
bool is_watched();
void touched(const void* stream, const std::string& who, const Ranges& reads, const Ranges& writes);
void recorded(const void* event, const void* stream);
void held(const void* stream, const void* event);
void host_waited_for_stream(const void* stream);
void host_waited_for_event(const void* event);
void forgotten(Range memory);  // given back: who gets it next has nothing to do with who had it

}  // namespace fake_cuda
