#pragma once
// Which micro-batches a rank reads: the one place where a mesh decides it.

#include "data/batch_source.h"
#include "parallel/mesh.h"

namespace upmoe {

inline Deal deal_of(const MeshSpec& mesh, int rank, std::int64_t micro_batches) {
  return {micro_batches, mesh.coord(rank, Axis::kDp), mesh.dp};
}
inline Deal deal_of(const ProcessMesh& mesh, std::int64_t micro_batches) {
  return deal_of(mesh.spec(), mesh.rank(), micro_batches);
}

}  // namespace upmoe
