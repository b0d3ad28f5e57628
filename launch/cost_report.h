#pragma once
// What `upmoe cost` prints of models and of what was printed about them: for people, and as JSON.

#include <optional>
#include <string>
#include <vector>

#include "configs/machine.h"
#include "trainer/cost/claim.h"
#include "trainer/cost/published.h"

namespace upmoe {

struct CostReport {
  std::string text, json;  // each ends with a line break
};

struct NamedCost {
  std::string name;
  ModelCost cost;
};

// How long a training is, and on what.
struct TrainingLength {
  std::optional<double> tokens;
  std::optional<Machine> machine;
  double mfu = 0.4;
};

CostReport models_report(const std::vector<NamedCost>& models, Recompute recompute,
                         const TrainingLength& training);

struct PublishedRow {
  const PublishedModel* published = nullptr;
  ModelCost cost;
};
CostReport published_report(const std::vector<PublishedRow>& rows);

// `card`: those of Marco-Nano's card.
CostReport claim_report(const std::vector<ClaimReading>& readings, const std::vector<ClaimReading>& card);

}  // namespace upmoe
