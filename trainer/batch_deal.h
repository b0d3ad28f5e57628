#pragma once
// Which micro-batches a rank reads: the one place where a mesh decides it, for training, evaluation and rehearsals.

#include "data/batch_source.h"
#include "parallel/mesh.h"

namespace upmoe {

inline Deal deal_of(const ProcessMesh& mesh, std::int64_t micro_batches) {
  return {micro_batches, mesh.coord(Axis::kDp), mesh.spec().dp};
}

}  // namespace upmoe
