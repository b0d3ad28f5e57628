#pragma once
// What a run reads before its first step: its model, its teacher's, its data.

#include "configs/run_config.h"

namespace upmoe {

// Opens all of it, on this rank, and reads no weights and no tokens. Throws the error that the run would end with, of a
// file that is not there or damaged, of a model that goes with neither its data nor so many ranks.
void require_inputs(RunConfig run, int ranks);

}  // namespace upmoe
