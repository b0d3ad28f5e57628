#pragma once
// What `upmoe plan` prints: for people, and as JSON.

#include <string>
#include <vector>

#include "trainer/plan/changes.h"
#include "trainer/plan/layout_search.h"

namespace upmoe {

struct PlanRequest {
  std::string run;                      // the file, as it was named
  std::string machine;                  // its name for people; empty: none
  bool beside_published = false;        // what others print for their mixture stands beside it
  std::vector<std::string> notes = {};  // of a plan of one layout: sentences on what it wastes
};

struct PlanReport {
  std::string text, json;  // each ends with a line break
};

PlanReport plan_report(const PlanRequest& request, const RunPlan& plan, const std::vector<Change>& changes);
PlanReport search_report(const PlanRequest& request, int world, const LayoutSearch& search);

}  // namespace upmoe
