#pragma once
// The ranks as a grid, seen twice, innermost axis fastest:
//   dense  (pp, dp, cp, tp)      sparse (pp, edp, ep, etp)      dp*cp*tp == edp*ep*etp

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "parallel/communicator.h"

namespace upmoe {

enum class Axis : std::uint8_t { kPp, kDp, kCp, kTp, kEdp, kEp, kEtp };
const char* name_of(Axis axis);  // "pp", "dp", ...

struct MeshSpec {
  int pp = 1, dp = 1, cp = 1, tp = 1, ep = 1, etp = 1;
  int world() const { return pp * dp * cp * tp; }
  int edp() const { return dp * cp * tp / (ep * etp); }
  int degree(Axis a) const;
  int coord(int rank, Axis a) const;
  // Everything wrong with this mesh for `world` ranks, one sentence each; empty when it is possible.
  std::vector<std::string> problems(int world_size) const;
  std::string str() const;  // "pp 1, dp 2, cp 1, tp 1, edp 1, ep 2, etp 1"
};

// Owns one communicator for each axis and each product of axes asked for at construction. Collective to build.
class ProcessMesh {
 public:
  // node_ranks: of the exchange of expert rows (along ep and etp), how many neighbours make a node; 0: no nodes.
  ProcessMesh(MeshSpec spec, Communicator& world, int node_ranks = 0);
  Communicator& world() const { return world_; }
  Communicator& along(Axis a) const { return along({a}); }
  // pp, dp, cp, tp, edp, {ep,etp}, {cp,tp}; throws for others.
  Communicator& along(std::initializer_list<Axis> axes) const;
  // The exchange's ranks with this one's place on every node, and those of its node; null without nodes.
  Communicator* across_nodes() const { return across_nodes_.get(); }
  Communicator* inside_node() const { return inside_node_.get(); }
  const MeshSpec& spec() const { return spec_; }
  int rank() const { return world_.rank(); }
  int coord(Axis a) const { return spec_.coord(world_.rank(), a); }

 private:
  MeshSpec spec_;
  Communicator& world_;
  std::map<std::vector<Axis>, std::unique_ptr<Communicator>> groups_;
  std::unique_ptr<Communicator> across_nodes_, inside_node_;
};

}  // namespace upmoe
