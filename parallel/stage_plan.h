#pragma once
// Blocks to pipeline stages by cost.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "parallel/layout.h"

namespace upmoe {

// Which pipeline stage computes which blocks. The chunks follow each other from the embedding to the head;
// chunk c belongs to stage c % stages, so a stage with several chunks (an interleaved schedule) holds blocks
// from several depths. The first chunk has the embedding, the last one the final norm and the head.
struct StagePlan {
  int stages = 1;
  std::vector<Range> chunks;  // of blocks; a multiple of `stages` of them, none empty unless there is one
  std::vector<double> share;  // of each chunk in the cost of all; empty with one stage
  int stage_of_block(std::int64_t block) const;
};
// Chunks of equal cost as far as whole blocks allow (the largest chunk is as small as possible; among equals,
// early chunks are the smaller ones). block_cost: any unit; `first`, `last`: of the embedding and of the head.
StagePlan one_stage(std::int64_t blocks);
StagePlan plan_stages(int stages, int chunks_per_stage, std::span<const double> block_cost, double first,
                      double last);
// For people: "stage 0: blocks 0-2 (57.1 %); stage 1: blocks 3 (42.9 %)".
std::string describe(const StagePlan& plan);

}  // namespace upmoe
