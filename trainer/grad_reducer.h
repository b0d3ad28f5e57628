#pragma once
// Sums gradients over the ranks that hold the same shard, and spreads updated weights back. Buckets are the
// parameters of one layer with one replica group and one dtype, so that nothing is rounded on its way; a bucket's
// slices are packed per owner and padded to equal size, so ownership stays the pure function of layout.h whatever the
// buckets are.
//
// Blocks travel through a few buffers (lanes) that they take in turns, four for each way of replication and dtype: a
// block's reduction ends at the latest when the fourth one after it begins, and updated weights are gathered
// four blocks ahead of the forward that waits for them.
//
// ZeRO-1: gradients are reduced once per step. ZeRO-2 (blocks share their gradient memory): every
// micro-batch's gradients are reduced as soon as a block is done and added to the owned slices; two lanes.

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

  // The gradients of `layer` (-1: outside the blocks) of one micro-batch are complete; `last`: for the step
  // as well. Starts their reduction when it is due, and leaves the memory that blocks share to the next one.
  // Gradients that nobody wrote are zero from here on. Collective; the same order on every rank.
  void ready(Exec& ex, int layer, bool last);
  // Waits for all reductions of this step: the owned slices of all gradients are now global sums.
  void finish(Exec& ex);
  // After the optimizer: every rank's owned slices of the values set out to the others. Collective; returns
  // while they travel, so the next forward can begin with the blocks that have arrived.
  void gather_values(Exec& ex);
  // Before anybody reads weights that others own: waits for those of `layer` (-1: outside the blocks), or
  // all. Collective, as it sends the next ones on their way: the same order on every rank, that of the table.
  void await_values(Exec& ex, int layer);
  void await_all_values(Exec& ex);
  std::size_t bytes() const;

 private:
  struct Bucket;
  struct Lane;
  void make_groups(const ProcessMesh& mesh);
  void make_buckets(const ProcessMesh& mesh);
  void make_lanes(Device device);
  Bucket& bucket_of(const StoredParam& param, Communicator& group);
  static void start_reduction(Exec& ex, Bucket& bucket);
  static void start_gather(Exec& ex, Bucket& bucket);
  static void complete(Exec& ex, Lane& lane);
  static void await(Exec& ex, Bucket& bucket);

  const ParamStore& params_;
  std::map<std::vector<std::int64_t>, std::unique_ptr<Communicator>> groups_;  // by holders_key
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<std::unique_ptr<Bucket>> buckets_;  // after the lanes: what is under way ends before its memory
  // By layer: share their gradient memory, reduced with nobody.
  std::multimap<int, const StoredParam*> alone_;
};

}  // namespace upmoe
