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

// One that runs measured: what a mixture's needed of a dense model's run to come to its final loss.
struct MeasuredReading {
  ClaimReading reading;
  std::string quantity;         // "tokens", "FLOPs" or "seconds"
  bool with_source = false;     // what the mixture's source had spent is charged to it
  std::optional<double> share;  // of the dense run's; none: the loss was never reached
  // It may be less: before its first point nobody knows when the run came there.
  bool at_most = false;
};
struct MeasuredClaim {
  std::string mixture, dense, source;  // names of runs; no source: empty
  double loss = 0;                     // that is to be reached
  bool taught = false;                 // a teacher's FLOPs are among those of a run
  std::vector<std::string> losses;     // what is compared, the mixture's and the dense run's
  std::vector<MeasuredReading> readings;
};

// `measured` stands behind the readings. `card`: those of Marco-Nano's card.
CostReport claim_report(const std::vector<ClaimReading>& readings,
                        const std::optional<MeasuredClaim>& measured, const std::vector<ClaimReading>& card);

}  // namespace upmoe
