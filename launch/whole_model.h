#pragma once
// A model of a directory for what a command looks up before or behind its work: whole on this rank, on the CPU.

#include <memory>

#include "configs/run_choices.h"
#include "data/model_source.h"
#include "trainer/rank_model.h"

namespace upmoe {

// `self`: make_self_communicator(), which outlives the model.
std::unique_ptr<RankModel> whole_model(const ModelSource& source, Communicator& self, Precision precision);

}  // namespace upmoe
