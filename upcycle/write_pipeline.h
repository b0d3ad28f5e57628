#pragma once
// Computing and writing at the same time: workers fill buffers, one more thread writes them.

#include <cstddef>
#include <functional>
#include <span>
#include <vector>

namespace upmoe {

struct PipelineStages {
  // Piece i into `buffer`, which holds an earlier piece and is to be resized; to 0: nothing to write. On
  // several threads.
  std::function<void(std::size_t i, std::vector<std::byte>& buffer)> make;
  // On one thread, in the order in which pieces got ready.
  std::function<void(std::size_t i, std::span<const std::byte> bytes)> write;
};

// Pieces 0 .. count-1, begun in this order. At most threads + 3 buffers exist: while the disk is slow, the
// workers run ahead by that much and then wait. The first exception of any thread ends the others and is
// rethrown.
void run_pipeline(std::size_t count, int threads, const PipelineStages& stages);

}  // namespace upmoe
