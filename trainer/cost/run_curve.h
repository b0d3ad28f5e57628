#pragma once
// Runs by what they cost: loss against tokens, FLOPs and seconds from metrics.jsonl, and what one run needs to reach
// the loss of another.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace upmoe {

// All ranks together, from the run's first step on. FLOPs are the model's, and those of a teacher that it learns from;
// seconds are those of steps, without evaluations and saves.
struct Spent {
  double tokens = 0, flops = 0, seconds = 0;
  Spent& operator+=(const Spent& other);
};

struct CurvePoint {
  Spent spent;
  double loss = 0;
};

struct RunCurve {
  std::string name;
  Spent spent;               // of the whole run
  double teacher_flops = 0;  // of `spent`, those of a teacher's forward
  bool held_out = false;     // points are evaluations; else of the smoothed training loss
  std::vector<CurvePoint> points;
  bool counts_experts = false;  // its lines say how experts share the tokens: a mixture's
  double final_loss() const { return points.back().loss; }
  // Until then: of a run that ended between two evaluations less than `spent`.
  const Spent& to_final_loss() const { return points.back().spent; }
};

// `run`: a run's directory, or a metrics.jsonl. Steps between two logged ones cost what the later one does, also up to
// an evaluation between them. Evaluations are taken where there are two or more of them; the training loss is smoothed
// over a fiftieth of the run to either side, less at its ends. A loss that is not finite is left out; where it is the
// last one, the run has none to be compared by, and is refused. Lines of newer programs are passed over. Throws
// Error(kBadInput) that names file and line.
RunCurve read_run_curve(const std::filesystem::path& run);

// Of several that are compared: by the training loss where one of them has no evaluations. Runs in folders of one name
// are called by as many of the folders above as tell them apart.
std::vector<RunCurve> read_run_curves(const std::vector<std::string>& runs);

struct Arrival {
  Spent spent;
  bool first = false;  // the run's first point lies there or below: it may have come there before
};
// What the run had spent when it first came to `loss`, straight between two points; nothing when it never did.
std::optional<Arrival> spent_at(const RunCurve& curve, double loss);

}  // namespace upmoe
