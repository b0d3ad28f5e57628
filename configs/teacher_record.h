#pragma once
// A run's teacher (RunConfig::Train::Teacher): its keys, and what cannot be together.

#include <string>
#include <vector>

#include "configs/model_config.h"
#include "configs/run_config.h"

namespace upmoe {

class Schema;

void add_teacher(Schema& schema, RunConfig::Train::Teacher& teacher);

// The run as its teacher sees it, in whose mesh the teacher's weights lie: a model without mixtures has no experts to
// divide, and nothing of it trains. Of a run with a teacher whose configuration was read.
RunConfig run_of_teacher(const RunConfig& run);

// One sentence for each; `found`: those of the run without its teacher, which are not said again. Nothing without a
// teacher.
std::vector<std::string> teacher_problems(const RunConfig& run, const ModelConfig& model, int world_size,
                                          const std::vector<std::string>& found);

}  // namespace upmoe
