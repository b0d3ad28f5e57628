#pragma once
// Computing and writing at the same time: workers fill buffers, one more thread writes them.

#include <cstddef>
#include <functional>
#include <span>

namespace upmoe {

struct PipelineStages {
  // Piece i into the front of `buffer` (aligned to kDiskBlock, contents left over from another piece);
  // returns its length. 0: nothing to write. On several threads.
  std::function<std::size_t(std::size_t i, std::span<std::byte> buffer)> make;
  // On one thread, in the order in which pieces got ready.
  std::function<void(std::size_t i, std::span<const std::byte> bytes)> write;
};

// Pieces 0 .. count-1, begun in this order. threads + 3 buffers of `buffer_bytes` exist: while the disk is
// slow, the workers run ahead by that much and then wait. The first exception of any thread ends the others
// and is rethrown.
void run_pipeline(std::size_t count, int threads, std::size_t buffer_bytes, const PipelineStages& stages);

}  // namespace upmoe
