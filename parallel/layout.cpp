#include "parallel/layout.h"

#include <algorithm>

#include "kernels/core/balanced.h"
#include "parallel/stage_plan.h"

namespace upmoe {

Box whole(const Shape& shape) {
  Box box{shape, shape};
  box.offset.dim.fill(0);
  return box;
}

bool contains(const Box& outer, const Box& inner) {
  if (outer.extent.rank != inner.extent.rank) return false;
  for (int d = 0; d < outer.extent.rank; ++d)
    if (inner.offset[d] < outer.offset[d] ||
        inner.offset[d] + inner.extent[d] > outer.offset[d] + outer.extent[d])
      return false;
  return true;
}

Box intersect(const Box& a, const Box& b) {
  UPMOE_CHECK(a.extent.rank == b.extent.rank, "boxes of rank {} and {}", a.extent.rank, b.extent.rank);
  Box r = a;
  for (int d = 0; d < a.extent.rank; ++d) {
    const auto i = static_cast<std::size_t>(d);
    const std::int64_t begin = std::max(a.offset[d], b.offset[d]);
    const std::int64_t end = std::min(a.offset[d] + a.extent[d], b.offset[d] + b.extent[d]);
    r.offset.dim[i] = begin;
    r.extent.dim[i] = std::max<std::int64_t>(0, end - begin);
  }
  return r;
}

Range balanced(std::int64_t n, std::int64_t parts, std::int64_t index) {
  UPMOE_CHECK(parts > 0 && 0 <= index && index < parts && n >= 0, "part {} of {} of {}", index, parts, n);
  return {balanced_begin(n, parts, index), balanced_begin(n, parts, index + 1)};
}

namespace {

// Key and value heads are held by several ranks along tp where there are fewer heads than ranks.
Range kv_heads_of(std::int64_t heads, std::int64_t tp, std::int64_t index) {
  //   2 heads, tp 4:   rank  0 1 2 3    holds head  0 0 1 1     and the gradients of a head are summed over its two
  if (tp <= heads) return balanced(heads, tp, index);
  const std::int64_t head = index * heads / tp;
  return {head, head + 1};
}

// How many ranks along tp hold the same key/value heads as `index`, and which of them it is.
Replica kv_replica(std::int64_t heads, std::int64_t tp, std::int64_t index) {
  if (tp <= heads) return {0, 1};
  Replica r{0, 0};
  for (std::int64_t i = 0; i < tp; ++i) {
    if (!(kv_heads_of(heads, tp, i) == kv_heads_of(heads, tp, index))) continue;
    if (i < index) ++r.index;
    ++r.count;
  }
  return r;
}

Range range_along(Dim dim, std::int64_t n, bool expert, const MeshSpec& mesh, int rank) {
  const auto part = [&](Axis a) { return balanced(n, mesh.degree(a), mesh.coord(rank, a)); };
  switch (dim) {
    case Dim::kExpert:
      return part(Axis::kEp);
    case Dim::kFfn:
      return part(expert ? Axis::kEtp : Axis::kTp);
    case Dim::kHeads:
    case Dim::kVocab:
      return part(Axis::kTp);
    case Dim::kKvHeads:
      return kv_heads_of(n, mesh.tp, mesh.coord(rank, Axis::kTp));
    case Dim::kEmbed:
    case Dim::kHeadSize:
    case Dim::kPair:
    case Dim::kOne:
      return {0, n};
  }
  return {0, n};
}

bool is_on_stage(const ParamSpec& p, const StagePlan& plan, int stage) {
  if (p.layer >= 0) return plan.stage_of_block(p.layer) == stage;
  const bool first = stage == 0, last = stage == plan.stages - 1;
  if (p.tied) return first || last;
  return p.role == Role::kEmbedding ? first : last;
}

// How a parameter is spread over the tp ranks of one stage.
enum class OverTp : std::uint8_t { kCut, kWhole, kKvHeads };

struct Spread {
  OverTp kind = OverTp::kWhole;
  std::int64_t kv_heads = 0;
};

Spread over_tp(const ParamSpec& p) {
  for (int d = 0; d < p.shape.rank; ++d) {
    const Dim dim = p.dims[static_cast<std::size_t>(d)];
    if (dim == Dim::kHeads || dim == Dim::kVocab || dim == Dim::kFfn) return {OverTp::kCut, 0};
    if (dim == Dim::kKvHeads) return {OverTp::kKvHeads, p.shape[d]};
  }
  return {};
}

// Position among the tp ranks of one stage and data coordinate that hold the same shard. Norms, routers and
// the gate of the shared expert: every tp rank holds them whole.
Replica along_tp(const ParamSpec& p, const MeshSpec& mesh, int rank) {
  const int tp = mesh.coord(rank, Axis::kTp);
  const Spread spread = over_tp(p);
  switch (spread.kind) {
    case OverTp::kCut:
      return {0, 1};
    case OverTp::kWhole:
      return {tp, mesh.tp};
    case OverTp::kKvHeads:
      return kv_replica(spread.kv_heads, mesh.tp, tp);
  }
  return {0, 1};
}

// Whether every rank along etp has the whole of its experts' part: adapters have matrices without a dim of neurons,
// which the pieces of an expert share.
bool whole_along_etp(const ParamSpec& p) {
  return p.expert && over_tp(p).kind != OverTp::kCut;
}

}  // namespace

Box shard_of(const ParamSpec& p, const MeshSpec& mesh, int rank, const StagePlan& plan) {
  UPMOE_CHECK(plan.stages == mesh.pp, "a plan of {} stages for pp {}", plan.stages, mesh.pp);
  Box box = whole(p.shape);
  const bool elsewhere = !is_on_stage(p, plan, mesh.coord(rank, Axis::kPp));
  for (int d = 0; d < p.shape.rank; ++d) {
    const auto i = static_cast<std::size_t>(d);
    const Range r = range_along(p.dims[i], p.shape[d], p.expert, mesh, rank);
    box.offset.dim[i] = elsewhere ? 0 : r.begin;
    box.extent.dim[i] = elsewhere ? 0 : r.size();
  }
  return box;
}

Replica replica_of(const ParamSpec& p, const MeshSpec& mesh, int rank) {
  const int edp = mesh.coord(rank, Axis::kEdp);
  if (whole_along_etp(p)) return {edp * mesh.etp + mesh.coord(rank, Axis::kEtp), mesh.edp() * mesh.etp};
  if (p.expert) return {edp, mesh.edp()};
  // Dense parameters are the same along dp and cp. Experts lie along another cut of the same ranks (ep, etp), of which
  // edp is what is left.
  int data = mesh.coord(rank, Axis::kDp) * mesh.cp + mesh.coord(rank, Axis::kCp), copies = mesh.dp * mesh.cp;
  if (p.tied && mesh.pp > 1) {  // the first and the last stage
    if (mesh.coord(rank, Axis::kPp) > 0) data += copies;
    copies *= 2;
  }
  const Replica tp = along_tp(p, mesh, rank);
  // tp runs fastest: the holders of one data coordinate are neighbours, so the slices they own are as well.
  return {data * tp.count + tp.index, copies * tp.count};
}

std::vector<std::int64_t> holders_key(const ParamSpec& p, const MeshSpec& mesh) {
  if (p.expert) return {1, whole_along_etp(p) && mesh.etp > 1 ? 1 : 0, 0, 0};
  const Spread spread = over_tp(p);
  const bool kv_cut = spread.kind == OverTp::kKvHeads && mesh.tp <= spread.kv_heads;
  const OverTp kind = mesh.tp == 1 || kv_cut ? OverTp::kCut : spread.kind;
  return {0, static_cast<std::int64_t>(kind), kind == OverTp::kKvHeads ? spread.kv_heads : 0,
          p.tied && mesh.pp > 1 ? 1 : 0};
}

std::vector<int> holders_of(const ParamSpec& p, const MeshSpec& mesh, int rank) {
  const auto is_end = [&](int r) {
    const int stage = mesh.coord(r, Axis::kPp);
    return stage == 0 || stage == mesh.pp - 1;
  };
  const auto same_stage = [&](int r) {
    // The first stage's embedding and the last one's head are one parameter: both ends hold and sum it.
    if (p.tied && is_end(rank)) return is_end(r);
    return mesh.coord(r, Axis::kPp) == mesh.coord(rank, Axis::kPp);
  };
  const Spread spread = over_tp(p);
  const auto same_shard = [&](int r) {
    if (p.expert)
      return mesh.coord(r, Axis::kEp) == mesh.coord(rank, Axis::kEp) &&
             (whole_along_etp(p) || mesh.coord(r, Axis::kEtp) == mesh.coord(rank, Axis::kEtp));
    const int mine = mesh.coord(rank, Axis::kTp), theirs = mesh.coord(r, Axis::kTp);
    if (spread.kind == OverTp::kCut) return mine == theirs;
    if (spread.kind == OverTp::kWhole) return true;
    return kv_heads_of(spread.kv_heads, mesh.tp, mine) == kv_heads_of(spread.kv_heads, mesh.tp, theirs);
  };
  std::vector<int> holders;
  for (int r = 0; r < mesh.world(); ++r)
    if (same_stage(r) && same_shard(r)) holders.push_back(r);
  return holders;
}

Range owner_slice(std::int64_t elements, Replica r) {
  return balanced(elements, r.count, r.index);
}

namespace {

// The box at flat position `at`, `n` elements long, that fills whole inner dims from dim `d` on.
Box piece(const Box& shard, std::int64_t at, int d, std::int64_t count, std::int64_t inner) {
  Box b = shard;
  std::int64_t rest = at / inner;  // position counted in units of dim d
  for (int i = d; i >= 0; --i) {
    const auto u = static_cast<std::size_t>(i);
    b.offset.dim[u] = shard.offset[i] + rest % shard.extent[i];
    b.extent.dim[u] = i == d ? count : 1;
    rest /= shard.extent[i];
  }
  return b;
}

}  // namespace

// Climbs from elements to rows to planes and down again: at most one box per dim on each side.
std::vector<Box> flat_range_to_boxes(const Box& shard, Range r) {
  UPMOE_CHECK(0 <= r.begin && r.begin <= r.end && r.end <= shard.elements(), "{}..{} of {}", r.begin, r.end,
              shard.elements());
  //   of a shard [3, 4], the flat range [2, 11):     . . x x     one row's end      1 x 2
  //                                                  x x x x     whole rows         1 x 4
  //                                                  x x x .     one row's beginning 1 x 3
  std::vector<Box> boxes;
  const int rank = shard.extent.rank;
  if (r.size() == 0) return boxes;
  if (rank == 0) return {shard};
  std::array<std::int64_t, 5> inner{};  // elements of one step along dim d
  inner[static_cast<std::size_t>(rank - 1)] = 1;
  for (int d = rank - 2; d >= 0; --d)
    inner[static_cast<std::size_t>(d)] = inner[static_cast<std::size_t>(d + 1)] * shard.extent[d + 1];
  std::int64_t at = r.begin;
  while (at < r.end) {
    // The outermost dim along which `at` begins a step and a whole step still fits.
    int d = 0;
    while (d < rank - 1 &&
           (at % inner[static_cast<std::size_t>(d)] != 0 || at + inner[static_cast<std::size_t>(d)] > r.end))
      ++d;
    const std::int64_t step = inner[static_cast<std::size_t>(d)];
    std::int64_t count = (r.end - at) / step;
    if (d > 0) count = std::min(count, shard.extent[d] - at / step % shard.extent[d]);
    boxes.push_back(piece(shard, at, d, count, step));
    at += count * step;
  }
  return boxes;
}

}  // namespace upmoe
