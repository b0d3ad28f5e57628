#include "parallel/mesh.h"

#include <algorithm>

#include "parallel/self_comm.h"

namespace upmoe {

const char* name_of(Axis axis) {
  switch (axis) {
    case Axis::kPp:
      return "pp";
    case Axis::kDp:
      return "dp";
    case Axis::kCp:
      return "cp";
    case Axis::kTp:
      return "tp";
    case Axis::kEdp:
      return "edp";
    case Axis::kEp:
      return "ep";
    case Axis::kEtp:
      return "etp";
  }
  return "unknown";
}

int MeshSpec::degree(Axis a) const {
  switch (a) {
    case Axis::kPp:
      return pp;
    case Axis::kDp:
      return dp;
    case Axis::kCp:
      return cp;
    case Axis::kTp:
      return tp;
    case Axis::kEdp:
      return edp();
    case Axis::kEp:
      return ep;
    case Axis::kEtp:
      return etp;
  }
  return 1;
}

// The ranks of a stage, counted twice: as dp x cp x tp for dense parameters, as edp x ep x etp for experts. The last
// axis runs fastest. dp 2, cp 1, tp 2 and edp 1, ep 4, etp 1 on one stage:
//
//   rank        0       1       2       3
//   (dp, tp)   (0, 0)  (0, 1)  (1, 0)  (1, 1)
//   ep          0       1       2       3        an expert's ranks span dp and tp
int MeshSpec::coord(int rank, Axis a) const {
  const int per_stage = dp * cp * tp, within = rank % per_stage;
  switch (a) {
    case Axis::kPp:
      return rank / per_stage;
    case Axis::kDp:
      return within / (cp * tp);
    case Axis::kCp:
      return within / tp % cp;
    case Axis::kTp:
      return within % tp;
    case Axis::kEdp:
      return within / (ep * etp);
    case Axis::kEp:
      return within / etp % ep;
    case Axis::kEtp:
      return within % etp;
  }
  return 0;
}

std::vector<std::string> MeshSpec::problems(int world_size) const {
  std::vector<std::string> found;
  for (const auto& [name, n] :
       {std::pair{"pp", pp}, {"dp", dp}, {"cp", cp}, {"tp", tp}, {"ep", ep}, {"etp", etp}})
    if (n < 1) found.push_back(fmt::format("{} is {}, expected at least 1", name, n));
  if (!found.empty()) return found;
  // In 128 bits: four degrees of up to 2^31 - 1 each.
  const auto stage = static_cast<__int128>(dp) * cp * tp;
  const __int128 dense = stage * pp;
  if (dense != world_size)
    found.push_back(fmt::format("pp {} x dp {} x cp {} x tp {} is {} ranks, {} were started", pp, dp, cp, tp,
                                dense, world_size));
  const __int128 experts = static_cast<__int128>(ep) * etp;
  if (stage % experts != 0)
    found.push_back(fmt::format("ep {} x etp {} = {} does not divide the {} ranks of dp x cp x tp", ep, etp,
                                experts, stage));
  return found;
}

std::string MeshSpec::str() const {
  return fmt::format("pp {}, dp {}, cp {}, tp {}, edp {}, ep {}, etp {}", pp, dp, cp, tp, edp(), ep, etp);
}

namespace {

// The ranks that agree with `rank` on every coordinate of their view except those of `axes`.
std::vector<int> members_of(const MeshSpec& spec, int rank, const std::vector<Axis>& axes) {
  const bool sparse = axes.front() == Axis::kEdp || axes.front() == Axis::kEp || axes.front() == Axis::kEtp;
  const std::vector<Axis> view = sparse ? std::vector<Axis>{Axis::kPp, Axis::kEdp, Axis::kEp, Axis::kEtp}
                                        : std::vector<Axis>{Axis::kPp, Axis::kDp, Axis::kCp, Axis::kTp};
  std::vector<int> members;
  for (int other = 0; other < spec.world(); ++other) {
    bool same = true;
    for (const Axis a : view)
      if (std::find(axes.begin(), axes.end(), a) == axes.end())
        same = same && spec.coord(rank, a) == spec.coord(other, a);
    if (same) members.push_back(other);
  }
  return members;
}

}  // namespace

ProcessMesh::ProcessMesh(MeshSpec spec, Communicator& world, int node_ranks) : spec_(spec), world_(world) {
  const std::vector<std::string> problems = spec.problems(world.size());
  UPMOE_CHECK(problems.empty(), "{}", problems.empty() ? "" : problems.front());
  // The same order on every rank: splitting is collective.
  const std::vector<std::vector<Axis>> wanted{{Axis::kPp},           {Axis::kDp},  {Axis::kCp},
                                              {Axis::kTp},           {Axis::kEdp}, {Axis::kEp, Axis::kEtp},
                                              {Axis::kCp, Axis::kTp}};
  for (const auto& axes : wanted) {
    std::int64_t size = 1;
    for (const Axis a : axes) size *= spec.degree(a);
    groups_[axes] =
        size == 1 ? make_self_communicator() : world.subgroup(members_of(spec, world.rank(), axes));
  }
  if (node_ranks == 0) return;
  const std::vector<int> exchange = members_of(spec, world.rank(), {Axis::kEp, Axis::kEtp});
  const auto ranks = static_cast<int>(exchange.size());
  UPMOE_CHECK(node_ranks > 0 && ranks % node_ranks == 0, "nodes of {} ranks in an exchange of {}", node_ranks,
              ranks);
  const int place = along({Axis::kEp, Axis::kEtp}).rank();
  std::vector<int> across, inside;
  for (int r = 0; r < ranks; ++r) {
    // Nodes of 2 in an exchange of 4: across | 0 2 |, | 1 3 |; inside | 0 1 |, | 2 3 |.
    if (r % node_ranks == place % node_ranks) across.push_back(exchange[static_cast<std::size_t>(r)]);
    if (r / node_ranks == place / node_ranks) inside.push_back(exchange[static_cast<std::size_t>(r)]);
  }
  across_nodes_ = world.subgroup(across);
  inside_node_ = world.subgroup(inside);
}

Communicator& ProcessMesh::along(std::initializer_list<Axis> axes) const {
  const auto it = groups_.find(std::vector<Axis>(axes));
  UPMOE_CHECK(it != groups_.end(), "the mesh has no group along {} axes beginning with {}", axes.size(),
              axes.size() > 0 ? name_of(*axes.begin()) : "none");
  return *it->second;
}

}  // namespace upmoe
