#pragma once
// What `upmoe cost` prints where several are compared: runs by what they spent and by a law of their losses, models by
// how fast they could be served.

#include <optional>
#include <string>
#include <vector>

#include "launch/cost_report.h"
#include "trainer/cost/roofline.h"
#include "trainer/cost/run_curve.h"
#include "trainer/cost/scaling_fit.h"

namespace upmoe {

// `source`: the run that made the dense source of the first one, whose cost is charged to that one as well.
CostReport runs_report(const std::vector<RunCurve>& runs, const std::optional<RunCurve>& source);

// What the mixture's run needed to come to the final loss of the dense model's, as readings of the claim: of its
// tokens, FLOPs and seconds, without what `source` had spent (sunk) and with it. Numbers are those of runs_report().
// Throws Error(kUsage) where the second run is a mixture's, too.
MeasuredClaim measured_claim(const RunCurve& mixture, const RunCurve& dense,
                             const std::optional<RunCurve>& source);

// `fit` is of these runs.
CostReport fit_report(const std::vector<RunOutcome>& runs, const ScalingFit& fit);

struct Served {
  std::string name;
  ServedModel model;
};
// A request: so many tokens in, so many out.
struct Request {
  std::int64_t prompt = 1000, output = 1000;
};
CostReport inference_report(const Served& first, const Served& second, const Machine& machine,
                            const Request& request);

}  // namespace upmoe
