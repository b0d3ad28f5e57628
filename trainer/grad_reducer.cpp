#include "trainer/grad_reducer.h"

#include <algorithm>
#include <deque>
#include <tuple>

#include "kernels/ops/pointwise.h"

namespace upmoe {

// How a bucket of two parameters, a and b, lies in a lane with a group of three ranks. Each parameter is owned in three
// flat slices; a rank's slices of all of them stand together, padded to the largest rank's, so that one reduce_scatter
// serves them all and rank r gets what it owns:
//
//   packed   | a/0 b/0 .. | a/1 b/1 .. | a/2 b/2 |        own   | a/r b/r .. |
//              segment 0    segment 1    segment 2
//
// Gathering weights goes the other way through the same memory: own -> packed -> the parameters' slices.
//
// Memory through which one bucket at a time travels.
struct GradReducer::Lane {
  std::size_t packed_bytes = 0, own_bytes = 0;  // of the largest bucket
  Buffer packed, own;
  Bucket* user = nullptr;       // under way
  std::deque<Bucket*> gathers;  // weights that are to follow
};

struct GradReducer::Bucket {
  int layer = -1;
  Communicator* group = nullptr;
  DType value_dtype = DType::kF32, grad_dtype = DType::kF32;  // of all its parameters
  std::vector<const StoredParam*> params;
  std::int64_t slice = 0;  // elements of one rank's part, the largest
  Lane* lane = nullptr;
  Pending pending;
  bool gathers = false;  // what is under way: weights, or else gradients
  bool reduced = false;  // this step's gradients, or are under way

  TensorView packed(DType dtype) const { return lane->packed.view({slice * group->size()}, dtype); }
  TensorView own(DType dtype) const { return lane->own.view({slice}, dtype); }
  TensorView segment(int rank, DType dtype) const {
    return packed(dtype).rows(rank * slice, (rank + 1) * slice);
  }

  // Calls move(param, its flat part that `rank` owns, the place of that part in `segment`).
  template <class Move>
  void for_each_slice(int rank, TensorView segment, const Move& move) const {
    std::int64_t at = 0;
    for (const StoredParam* p : params) {
      const Range r = owner_slice(p->value.elements(), {rank, group->size()});
      if (r.size() > 0) move(*p, r, segment.rows(at, at + r.size()));
      at += r.size();
    }
  }
};

namespace {

TensorView part(const TensorView& tensor, Range r) {
  return tensor.reshape({tensor.elements()}).rows(r.begin, r.end);
}

// One micro-batch's sum over the ranks, to those before it.
void sum_up(Exec& ex, const StoredParam& p, ConstTensorView sum) {
  const GradientView owned = p.write_owned_grad();
  owned.adds() ? ops::add(ex, owned, owned, sum) : ops::cast(ex, owned, sum);
}

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

GradReducer::GradReducer(const ParamStore& params, const ProcessMesh& mesh, Device device) : params_(params) {
  make_groups(mesh);
  make_buckets(mesh);
  make_lanes(device);
}

GradReducer::~GradReducer() = default;

// One group for each way in which parameters are replicated, made in the order of the table, which every rank
// goes through alike: dp x cp for what tp cuts, with tp as well for what it does not, edp for experts, the
// ranks around a key/value head that several hold, both ends of the pipeline for a tied embedding.
void GradReducer::make_groups(const ProcessMesh& mesh) {
  for (const StoredParam& p : params_.all()) {
    std::unique_ptr<Communicator>& group = groups_[holders_key(p.spec, mesh.spec())];
    if (group == nullptr) group = mesh.world().subgroup(holders_of(p.spec, mesh.spec(), mesh.rank()));
  }
}

GradReducer::Bucket& GradReducer::bucket_of(const StoredParam& p, Communicator& group) {
  for (auto& b : buckets_)
    if (b->layer == p.spec.layer && b->group == &group && b->value_dtype == p.value.dtype &&
        b->grad_dtype == p.grad.dtype)
      return *b;
  Bucket& b = *buckets_.emplace_back(std::make_unique<Bucket>());
  b.layer = p.spec.layer;
  b.group = &group;
  b.value_dtype = p.value.dtype;
  b.grad_dtype = p.grad.dtype;
  return b;
}

void GradReducer::make_buckets(const ProcessMesh& mesh) {
  for (const StoredParam& p : params_.all()) {
    if (!p.trains() || p.value.elements() == 0) continue;
    Communicator& group = *groups_.at(holders_key(p.spec, mesh.spec()));
    UPMOE_CHECK(p.replica.count == group.size() && p.replica.index == group.rank(),
                "'{}': replica {} of {}, group {} of {}", p.spec.name, p.replica.index, p.replica.count,
                group.rank(), group.size());
    if (group.size() > 1) {
      bucket_of(p, group).params.push_back(&p);
    } else if (p.shares_grad) {
      alone_.emplace(p.spec.layer, &p);
    }
  }
}

void GradReducer::make_lanes(Device device) {
  std::map<std::tuple<Communicator*, DType, bool, std::size_t>, Lane*> lane_of;
  std::map<std::pair<Communicator*, DType>, std::size_t> blocks;
  for (auto& b : buckets_) {
    b->slice = largest_slice(b->params, b->group->size());
    const bool in_block = b->layer >= 0;
    // Blocks take the lanes in turns; what is outside the blocks has one of its own, as it is ready last of all and its
    // weights are wanted first.
    const std::size_t turn = in_block ? blocks[{b->group, b->value_dtype}]++ : 0;
    Lane*& lane =
        lane_of[{b->group, b->value_dtype, in_block, turn % (params_.shares_block_grads() ? 2 : 4)}];
    if (lane == nullptr) lane = lanes_.emplace_back(std::make_unique<Lane>()).get();
    b->lane = lane;
    const std::size_t element = std::max(size_of(b->value_dtype), size_of(b->grad_dtype)),
                      own = static_cast<std::size_t>(b->slice) * element;
    lane->own_bytes = std::max(lane->own_bytes, own);
    lane->packed_bytes = std::max(lane->packed_bytes, own * static_cast<std::size_t>(b->group->size()));
  }
  for (auto& lane : lanes_) {
    lane->packed = Buffer::allocate(device, lane->packed_bytes);
    lane->own = Buffer::allocate(device, lane->own_bytes);
  }
}

// What travels through the lane comes to its end; the next weights set out.
void GradReducer::complete(Exec& ex, Lane& lane) {
  if (lane.user == nullptr) return;
  Bucket& b = *lane.user;
  b.pending.wait();
  lane.user = nullptr;
  if (!b.gathers) {
    b.for_each_slice(b.group->rank(), b.own(b.grad_dtype), [&](const StoredParam& p, Range, TensorView sum) {
      p.shares_grad ? sum_up(ex, p, sum) : ops::cast(ex, p.owned_grad, sum);
    });
    return;
  }
  for (int r = 0; r < b.group->size(); ++r) {
    if (r == b.group->rank()) continue;
    b.for_each_slice(r, b.segment(r, b.value_dtype),
                     [&](const StoredParam& p, Range range, TensorView packed) {
                       ops::cast(ex, part(p.value, range), packed);
                     });
  }
  b.gathers = false;
  if (lane.gathers.empty()) return;
  Bucket* next = lane.gathers.front();
  lane.gathers.pop_front();
  start_gather(ex, *next);
}

void GradReducer::start_reduction(Exec& ex, Bucket& b) {
  // A lane never carries weights and gradients at once: every forward has waited for its weights before a backward
  // begins.
  UPMOE_CHECK(!b.gathers && b.lane->gathers.empty(), "layer {} still waits for its weights", b.layer);
  // The block that had this lane before ends now, at the latest.
  complete(ex, *b.lane);
  const DType dtype = b.grad_dtype;
  for (int r = 0; r < b.group->size(); ++r)
    b.for_each_slice(r, b.segment(r, dtype), [&](const StoredParam& p, Range range, TensorView packed) {
      ops::cast(ex, packed, part(p.grad, range));
    });
  b.reduced = true;
  b.lane->user = &b;
  b.pending = b.group->reduce_scatter(b.own(dtype), b.packed(dtype), ex);
}

void GradReducer::start_gather(Exec& ex, Bucket& b) {
  const DType dtype = b.value_dtype;
  b.for_each_slice(b.group->rank(), b.own(dtype), [&](const StoredParam& p, Range range, TensorView packed) {
    ops::cast(ex, packed, part(p.value, range));
  });
  b.lane->user = &b;
  b.pending = b.group->all_gather(b.packed(dtype), b.own(dtype), ex);
}

void GradReducer::ready(Exec& ex, int layer, bool last) {
  const bool every = params_.shares_block_grads() && layer >= 0;
  if (!every && !last) return;
  params_.zero_unwritten_gradients(ex, layer);
  for (auto& b : buckets_)
    if (b->layer == layer) start_reduction(ex, *b);
  if (!every) return;
  const auto [begin, end] = alone_.equal_range(layer);
  for (auto it = begin; it != end; ++it) {
    const StoredParam& p = *it->second;
    sum_up(ex, p, part(p.grad, p.owned));
  }
  params_.forget_shared_gradients(layer);  // packed or added: the next block may have it
}

void GradReducer::finish(Exec& ex) {
  for (auto& b : buckets_) {
    UPMOE_CHECK(b->reduced, "gradients of layer {} were never ready", b->layer);
    // Otherwise a later block of its lane has completed it already.
    if (b->lane->user == b.get()) complete(ex, *b->lane);
    b->reduced = false;
  }
}

void GradReducer::gather_values(Exec& ex) {
  for (auto& b : buckets_) {
    b->gathers = true;
    if (b->lane->user == nullptr) {
      start_gather(ex, *b);
    } else {
      // Buckets come in the order of the table, which is that of the forward: the first blocks' weights set out first.
      b->lane->gathers.push_back(b.get());
    }
  }
}

void GradReducer::await(Exec& ex, Bucket& b) {
  while (b.gathers) complete(ex, *b.lane);  // those before it in its lane as well
}

void GradReducer::await_values(Exec& ex, int layer) {
  for (auto& b : buckets_)
    if (b->layer == layer) await(ex, *b);
}

void GradReducer::await_all_values(Exec& ex) {
  for (auto& b : buckets_) await(ex, *b);
}

std::size_t GradReducer::bytes() const {
  std::size_t bytes = 0;
  for (const auto& lane : lanes_) bytes += lane->packed.bytes() + lane->own.bytes();
  return bytes;
}

}  // namespace upmoe
