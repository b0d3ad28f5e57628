#pragma once
// What the tests set and ask of the pretended GPUs.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fake_cuda {

void set_devices(int count, int major = 9,
                 int minor = 0);     // 8 of compute capability 9.0 at first; -1: no driver
void set_memory(std::size_t bytes);  // of each device; allocations fail beyond it
std::size_t allocated();             // bytes, of all devices
// Pieces of work wait a random while before they begin, so that work which nothing orders comes in another
// order. 0: no delays. The environment variable UPMOE_FAKE_DELAYS sets the beginning.
void set_delays(std::uint64_t seed);
// The next `times` calls of this name (say "cudaMemcpyAsync") fail with `error`.
void fail_next(const char* call, int error, int times = 1);

// Calls of this thread so far that hold the host until the device has come to something: for a stream, the device or
// an event, and copies to memory of the host that is not pinned.
int host_waits();

// A product as cuBLASLt was asked for it, column-major.
struct Matmul {
  std::int64_t m, n, k;
  const void *stream, *workspace;
  int algorithm;  // which of those that the heuristics offered
};
std::vector<Matmul> take_matmuls();  // since the last call
int heuristic_calls();               // so far
int cudnn_builds();                  // graphs that were built, or refused, so far
int cudnn_any_order_builds();        // of those, the ones whose sums have no order
int cudnn_executions();

// How many of NCCL's operations a GPU takes at once, 4 at first: the others wait for a free place, in the order in
// which they were given where NCCL_LAUNCH_ORDER_IMPLICIT is 1, else as it comes.
void set_nccl_at_once(int operations);
void set_nccl_version(int version);
// A call of NCCL that moves bytes: on which rank of how many, and to, from or with which.
struct NcclCall {
  std::string name;
  int ranks, rank, peer;
  std::size_t bytes;
};
std::vector<NcclCall> take_nccl_calls();  // since the last call

}  // namespace fake_cuda
