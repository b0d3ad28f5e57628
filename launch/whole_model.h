#pragma once
// Models of a directory.

#include <memory>

#include "configs/run_choices.h"
#include "data/model_source.h"
#include "trainer/rank_model.h"

namespace upmoe {

// This rank's part of every parameter.
void load_weights(RankModel& model, const ModelSource& source);

// For what a command looks up before or behind its work: whole on this rank, on the CPU. `self`:
// make_self_communicator(), which outlives the model.
std::unique_ptr<RankModel> whole_model(const ModelSource& source, Communicator& self, Precision precision);

}  // namespace upmoe
