#pragma once
// Who holds and who owns which elements of a parameter: pure functions over global coordinates. Model,
// optimizer, checkpoint and upcycling all use these and nothing else.
//
// Invariant (a property test): for every mesh, every element of every parameter is owned by exactly one rank.

#include <cstdint>
#include <vector>

#include "configs/param_table.h"
#include "parallel/mesh.h"

namespace upmoe {

struct StagePlan;  // stage_plan.h

struct Range {
  std::int64_t begin = 0, end = 0;
  std::int64_t size() const { return end - begin; }
  friend bool operator==(const Range&, const Range&) = default;
};

struct Box {  // hyper-rectangle of the GLOBAL tensor; offset.rank == extent.rank
  Shape offset, extent;
  std::int64_t elements() const { return extent.elements(); }
  friend bool operator==(const Box&, const Box&) = default;
};
Box whole(const Shape& shape);
bool contains(const Box& outer, const Box& inner);
Box intersect(const Box& a, const Box& b);  // extents 0 where they do not meet

struct Replica {  // position among the ranks that hold the same shard
  int index = 0, count = 1;
};

// Part `index` of `parts` of n: [n*index/parts, n*(index+1)/parts). 60 experts over 8 ranks: 7 or 8 each.
Range balanced(std::int64_t n, std::int64_t parts, std::int64_t index);

// The part of p that `rank` computes with. Empty (extent 0) when another pipeline stage holds the parameter.
Box shard_of(const ParamSpec& p, const MeshSpec& mesh, int rank, const StagePlan& plan);
Replica replica_of(const ParamSpec& p, const MeshSpec& mesh, int rank);
// The ranks that hold the same shard of p as `rank`, in rising order: replica i is the i-th of them. (On a
// stage without p: the ranks that would.)
std::vector<int> holders_of(const ParamSpec& p, const MeshSpec& mesh, int rank);
// Parameters with equal keys are held by the same ranks, on every rank of a stage that has them.
std::vector<std::int64_t> holders_key(const ParamSpec& p, const MeshSpec& mesh);
// ZeRO: the flat part of a shard of `elements` elements that replica r owns.
Range owner_slice(std::int64_t elements, Replica r);
// The boxes of the global tensor that a flat range of a shard covers, in flat order; at most 2*rank - 1.
std::vector<Box> flat_range_to_boxes(const Box& shard, Range r);

}  // namespace upmoe
