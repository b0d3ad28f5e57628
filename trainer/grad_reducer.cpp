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
  bool started = false;

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

GradReducer::GradReducer(const ParamStore& params, const ProcessMesh& mesh, Device device) {
  std::map<std::pair<int, bool>, Bucket*> by_key;
  for (const StoredParam& p : params.all()) {
    if (p.frozen || p.value.elements() == 0) continue;
    Communicator& group = p.spec.expert ? mesh.along(Axis::kEdp) : mesh.along({Axis::kDp, Axis::kCp});
    if (group.size() == 1) continue;
    UPMOE_CHECK(p.replica.count == group.size() && p.replica.index == group.rank(),
                "'{}': replica {} of {}, group {} of {}", p.spec.name, p.replica.index, p.replica.count,
                group.rank(), group.size());
    Bucket*& bucket = by_key[{p.spec.layer, p.spec.expert}];
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
  }
  for (auto& b : buckets_) {
    b->pending.wait();
    for (int r = 0; r < b->group->size(); ++r) {
      if (r == b->group->rank()) continue;
      b->for_each_slice(r, b->segment(r), &StoredParam::value,
                        [&](TensorView tensor, TensorView packed) { ops::cast(ex, tensor, packed); });
    }
  }
}

}  // namespace upmoe
