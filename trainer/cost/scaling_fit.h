#pragma once
// Laws fitted to the final losses of runs, least squares in nats: how the loss goes with size and tokens, and with the
// tokens before and after upcycling.
//
//   L = E + A N^-a + B D^-b                     a term whose quantity is the same in all runs is left out
//   L = E + A D1^-p D2^(-q + r ln D1)           with sources: D1 tokens of the dense source, D2 of the run itself; the
//                                               form of "Scaling Laws for Upcycling Mixture-of-Experts Language Models"
//                                               (arXiv 2502.03009)
//
// N is what a token costs: FLOPs of the model per token of training / 6, attention included, a teacher's left out.

#include <optional>
#include <string>
#include <vector>

#include "trainer/cost/run_curve.h"

namespace upmoe {

struct RunOutcome {
  std::string name;
  double size = 0;                      // N
  double tokens = 0;                    // D or D2
  std::optional<double> source_tokens;  // D1
  double loss = 0;                      // nats, at the run's end
  bool held_out = false;
};
RunOutcome outcome_of(const RunCurve& run, const RunCurve* source);

struct FittedNumber {
  std::string name;
  double value = 0;
  // What it is with each run left out in turn; nothing where too few would be left.
  std::optional<std::pair<double, double>> range;
};

struct ScalingFit {
  std::string law;
  std::vector<FittedNumber> numbers;
  std::vector<double> predicted;  // losses, one for each run
  double rms = 0;                 // of the residuals, nats
  std::vector<std::string> remarks;
};

// Throws Error(kUsage) that says which runs are missing: more of them than the law has numbers, and for every quantity
// that differs three values of it.
ScalingFit fit_scaling(const std::vector<RunOutcome>& runs);

}  // namespace upmoe
