#pragma once
// In which order a pipeline stage runs forward and backward of its micro-batches: one forward, one backward
// (1F1B, arXiv 2104.04473), interleaved where a stage has several chunks. Pure.

#include <vector>

namespace upmoe {

struct PipelineAction {
  bool forward = true;
  int micro_batch = 0;  // of this step
  int chunk = 0;        // of this stage, from 0
  friend bool operator==(const PipelineAction&, const PipelineAction&) = default;
};

// Forwards before the first backward: as many as keep all stages busy, at most all. With several chunks,
// `micro_batches` must be a multiple of `stages`: the chunks take turns in groups of that size.
std::vector<PipelineAction> pipeline_schedule(int stages, int stage, int chunks_per_stage, int micro_batches);

}  // namespace upmoe
