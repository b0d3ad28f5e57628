#pragma once
// Runs of golden models that learn from another golden model, or from themselves.

#include <functional>
#include <memory>
#include <string>

#include "tests/support/layout_run.h"

namespace upmoe::test {

// What Layout::change is for such a run.
inline std::function<void(RunConfig&)> taught_by(const std::string& teacher, double weight,
                                                 double temperature) {
  const auto config = std::make_shared<const ModelConfig>(Golden(teacher).config());
  return [=](RunConfig& run) { run.train.teacher = {teacher, weight, temperature, config}; };
}

// run_in_layout of a layout whose `change` is taught_by(teacher, ...), with the teacher's golden weights.
inline Outcome run_taught(const Layout& layout, const std::string& teacher) {
  const Golden of_teacher(teacher);
  return run_in_layout(layout,
                       [&](Session& s) { s.teacher->load(s.memory.exec, golden_weights(of_teacher)); });
}

}  // namespace upmoe::test
