#pragma once
// Sums gradients over the ranks that hold the same shard, and spreads updated weights back: ZeRO-1. Buckets
// are the parameters of one layer with one replica group; a bucket's slices are packed per owner and padded
// to equal size, so ownership stays the pure function of layout.h whatever the buckets are.

#include <map>
#include <memory>
#include <vector>

#include "parallel/mesh.h"
#include "trainer/model/param_store.h"

namespace upmoe {

class GradReducer {
 public:
  GradReducer(const ParamStore& params, const ProcessMesh& mesh, Device device);
  ~GradReducer();

  // The gradients of `layer` (-1: outside the blocks) are complete: starts their reduction. Collective; the
  // same order on every rank.
  void ready(Exec& ex, int layer);
  // Waits for all reductions of this step: the owned slices of all gradients are now global sums.
  void finish(Exec& ex);
  // After the optimizer: every rank's owned slices of the values set out to the others. Collective; returns
  // while they travel, so the next forward can begin with the blocks that have arrived.
  void gather_values(Exec& ex);
  // Before anybody reads weights that others own: waits for those of `layer` (-1: outside the blocks), or
  // all.
  void await_values(Exec& ex, int layer);
  void await_all_values(Exec& ex);

 private:
  struct Bucket;
  static void receive_values(Exec& ex, Bucket& bucket);
  void make_groups(const ParamStore& params, const ProcessMesh& mesh);

  std::map<std::vector<std::int64_t>, std::unique_ptr<Communicator>> groups_;  // by holders_key
  std::vector<std::unique_ptr<Bucket>> buckets_;
};

}  // namespace upmoe
