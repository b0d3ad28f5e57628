#include "trainer/grad_reducer.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <tuple>

#include "kernels/ops/pack.h"
#include "kernels/ops/pointwise.h"

namespace upmoe {

// How a bucket of two parameters, a and b, lies in a lane with a group of three ranks. Each parameter is owned in three
// flat slices; a rank's slices of all of them stand together, padded to the largest rank's, so that one reduce_scatter
// serves them all and rank r gets what it owns:
//
//   packed   | a/0 b/0 .. | a/1 b/1 .. | a/2 b/2 |        own   | a/r b/r .. |
//              row 0        row 1        row 2
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
  // Of them, in their order: the whole shards, and the slices that this rank owns.
  std::vector<TensorView> values, own_grads;
  std::vector<ConstTensorView> grads, own_values;
  PackedParts shards, owned;  // how those lie in `packed` and in `own`, a row for each rank and one row
  Lane* lane = nullptr;
  Pending pending;
  bool gathers = false;  // what is under way: weights, or else gradients
  bool reduced = false;  // this step's gradients, or are under way

  std::int64_t slice() const { return shards.slice(); }  // elements of one rank's part, the largest
  TensorView packed(DType dtype) const { return lane->packed.view({group->size(), slice()}, dtype); }
  TensorView own(DType dtype) const { return lane->own.view({1, slice()}, dtype); }

  void add(const StoredParam& p);
  void lay_out();  // its parameters are all there
  Accumulate write_own_grads() const;
};

namespace {

TensorView part(const TensorView& tensor, Range r) {
  return tensor.reshape({tensor.elements()}).rows(r.begin, r.end);
}

}  // namespace

void GradReducer::Bucket::add(const StoredParam& p) {
  params.push_back(&p);
  values.push_back(p.value);
  grads.emplace_back(p.grad);
  own_values.emplace_back(part(p.value, p.owned));
  own_grads.push_back(p.owned_grad);
}

void GradReducer::Bucket::lay_out() {
  std::vector<std::int64_t> whole, own;
  for (const StoredParam* p : params) {
    whole.push_back(p->value.elements());
    own.push_back(p->owned.size());
  }
  shards = PackedParts(std::move(whole), group->size());
  owned = PackedParts(std::move(own), 1);
  UPMOE_CHECK(owned.slice() == shards.row_elements(group->rank()),
              "layer {}: a rank owns {} elements, and is sent {}", layer, owned.slice(),
              shards.row_elements(group->rank()));
}

// What a sum over the ranks is to the owned slices: the first micro-batch's is written over what stands there, the
// others of gradients whose memory blocks share are added.
Accumulate GradReducer::Bucket::write_own_grads() const {
  std::optional<Accumulate> mode;
  for (const StoredParam* p : params) {
    const Accumulate own = p->shares_grad ? p->write_owned_grad().mode : Accumulate::kOverwrite;
    UPMOE_CHECK(mode.value_or(own) == own, "'{}' has sums of other micro-batches than its neighbours",
                p->spec.name);
    mode = own;
  }
  return mode.value();
}

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
      bucket_of(p, group).add(p);
    } else if (p.shares_grad) {
      alone_.emplace(p.spec.layer, &p);
    }
  }
  for (auto& b : buckets_) b->lay_out();
}

void GradReducer::make_lanes(Device device) {
  std::map<std::tuple<Communicator*, DType, bool, std::size_t>, Lane*> lane_of;
  std::map<std::pair<Communicator*, DType>, std::size_t> blocks;
  for (auto& b : buckets_) {
    const bool in_block = b->layer >= 0;
    // Blocks take the lanes in turns; what is outside the blocks has one of its own, as it is ready last of all and its
    // weights are wanted first.
    const std::size_t turn = in_block ? blocks[{b->group, b->value_dtype}]++ : 0;
    Lane*& lane =
        lane_of[{b->group, b->value_dtype, in_block, turn % (params_.shares_block_grads() ? 2 : 4)}];
    if (lane == nullptr) lane = lanes_.emplace_back(std::make_unique<Lane>()).get();
    b->lane = lane;
    const std::size_t element = std::max(size_of(b->value_dtype), size_of(b->grad_dtype)),
                      own = static_cast<std::size_t>(b->slice()) * element;
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
    ops::unpack_parts(ex, b.own_grads, b.own(b.grad_dtype), b.owned, kNoRow, b.write_own_grads());
    return;
  }
  // But for its own: those stand where the optimizer left them.
  ops::unpack_parts(ex, b.values, b.packed(b.value_dtype), b.shards, b.group->rank(), Accumulate::kOverwrite);
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
  ops::pack_parts(ex, b.packed(dtype), b.grads, b.shards);
  b.reduced = true;
  b.lane->user = &b;
  b.pending = b.group->reduce_scatter(b.own(dtype), b.packed(dtype), ex);
}

void GradReducer::start_gather(Exec& ex, Bucket& b) {
  const DType dtype = b.value_dtype;
  ops::pack_parts(ex, b.own(dtype), b.own_values, b.owned);
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
    const ConstTensorView sum = part(p.grad, p.owned);
    const GradientView owned = p.write_owned_grad();
    owned.adds() ? ops::add(ex, owned, owned, sum) : ops::cast(ex, owned, sum);
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
