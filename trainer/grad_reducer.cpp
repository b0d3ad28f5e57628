#include "trainer/grad_reducer.h"

#include <algorithm>
#include <map>

#include "kernels/ops/pointwise.h"

namespace upmoe {

struct GradReducer::Bucket {
  int layer = -1;
  Communicator* group = nullptr;
  std::vector<const StoredParam*> params;
  std::int64_t slice = 0;  // elements of one rank's part, the largest
  DType dtype = DType::kF32;
  Buffer packed_memory, own_memory;
  TensorView packed, own;  // [ranks * slice], [slice]
  Pending pending;
  bool started = false, gathering = false;

  // Calls move(flat part of `which` tensor, part of the packed buffer) for every parameter and rank.
  template <class Move>
  void for_each_slice(int rank, TensorView segment, TensorView StoredParam::*which, const Move& move) const {
    std::int64_t at = 0;
    for (const StoredParam* p : params) {
      const TensorView tensor = p->*which;
      const Range r = owner_slice(tensor.elements(), {rank, group->size()});
      if (r.size() > 0)
        move(tensor.reshape({tensor.elements()}).rows(r.begin, r.end), segment.rows(at, at + r.size()));
      at += r.size();
    }
  }
  TensorView segment(int rank) const { return packed.rows(rank * slice, (rank + 1) * slice); }
};

namespace {

std::int64_t largest_slice(const std::vector<const StoredParam*>& params, int ranks) {
  std::int64_t largest = 0;
  for (int r = 0; r < ranks; ++r) {
    std::int64_t n = 0;
    for (const StoredParam* p : params) n += owner_slice(p->value.elements(), {r, ranks}).size();
    largest = std::max(largest, n);
  }
  return largest;
}

}  // namespace

// One group for each way in which parameters are replicated, made in the order of the table, which every rank
// goes through alike: dp x cp for what tp cuts, with tp as well for what it does not, edp for experts, the
// ranks around a key/value head that several hold, both ends of the pipeline for a tied embedding.
void GradReducer::make_groups(const ParamStore& params, const ProcessMesh& mesh) {
  for (const StoredParam& p : params.all()) {
    std::unique_ptr<Communicator>& group = groups_[holders_key(p.spec, mesh.spec())];
    if (group != nullptr) continue;
    const std::vector<int> holders = holders_of(p.spec, mesh.spec(), mesh.rank());
    group = mesh.world().subgroup(holders);
  }
}

GradReducer::GradReducer(const ParamStore& params, const ProcessMesh& mesh, Device device) {
  make_groups(params, mesh);
  std::map<std::pair<int, Communicator*>, Bucket*> by_key;
  for (const StoredParam& p : params.all()) {
    if (p.frozen || p.value.elements() == 0) continue;
    Communicator& group = *groups_.at(holders_key(p.spec, mesh.spec()));
    if (group.size() == 1) continue;
    UPMOE_CHECK(p.replica.count == group.size() && p.replica.index == group.rank(),
                "'{}': replica {} of {}, group {} of {}", p.spec.name, p.replica.index, p.replica.count,
                group.rank(), group.size());
    Bucket*& bucket = by_key[{p.spec.layer, &group}];
    if (bucket == nullptr) {
      buckets_.push_back(std::make_unique<Bucket>());
      bucket = buckets_.back().get();
      bucket->layer = p.spec.layer;
      bucket->group = &group;
      bucket->dtype = params.dtype();
    }
    bucket->params.push_back(&p);
  }
  for (auto& b : buckets_) {
    const int ranks = b->group->size();
    b->slice = largest_slice(b->params, ranks);
    const std::size_t bytes = static_cast<std::size_t>(b->slice) * size_of(b->dtype);
    b->packed_memory = Buffer::allocate(device, bytes * static_cast<std::size_t>(ranks));
    b->own_memory = Buffer::allocate(device, bytes);
    b->packed = b->packed_memory.view({b->slice * ranks}, b->dtype);
    b->own = b->own_memory.view({b->slice}, b->dtype);
  }
}

GradReducer::~GradReducer() = default;

void GradReducer::ready(Exec& ex, int layer) {
  for (auto& b : buckets_) {
    if (b->layer != layer) continue;
    UPMOE_CHECK(!b->gathering, "layer {} still waits for its weights", layer);  // they share the buffer
    for (int r = 0; r < b->group->size(); ++r)
      b->for_each_slice(r, b->segment(r), &StoredParam::grad,
                        [&](TensorView tensor, TensorView packed) { ops::cast(ex, packed, tensor); });
    b->pending = b->group->reduce_scatter(b->own, b->packed, ex.comm);
    b->started = true;
  }
}

void GradReducer::finish(Exec& ex) {
  for (auto& b : buckets_) {
    UPMOE_CHECK(b->started, "gradients of layer {} were never ready", b->layer);
    b->pending.wait();
    b->started = false;
    b->for_each_slice(b->group->rank(), b->own, &StoredParam::grad,
                      [&](TensorView tensor, TensorView packed) { ops::cast(ex, tensor, packed); });
  }
}

void GradReducer::gather_values(Exec& ex) {
  for (auto& b : buckets_) {
    b->for_each_slice(b->group->rank(), b->own, &StoredParam::value,
                      [&](TensorView tensor, TensorView packed) { ops::cast(ex, packed, tensor); });
    b->pending = b->group->all_gather(b->packed, b->own, ex.comm);
    b->gathering = true;
  }
}

void GradReducer::receive_values(Exec& ex, Bucket& b) {
  if (!b.gathering) return;
  b.pending.wait();
  b.gathering = false;
  for (int r = 0; r < b.group->size(); ++r) {
    if (r == b.group->rank()) continue;
    b.for_each_slice(r, b.segment(r), &StoredParam::value,
                     [&](TensorView tensor, TensorView packed) { ops::cast(ex, tensor, packed); });
  }
}

void GradReducer::await_values(Exec& ex, int layer) {
  for (auto& b : buckets_)
    if (b->layer == layer) receive_values(ex, *b);
}

void GradReducer::await_all_values(Exec& ex) {
  for (auto& b : buckets_) receive_values(ex, *b);
}

}  // namespace upmoe
