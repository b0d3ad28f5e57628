#include "trainer/cost/run_curve.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>

#include "kernels/core/check.h"

namespace upmoe {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

// "runs/moe", "runs/moe/" and "runs/moe/metrics.jsonl" are all in runs/moe.
fs::path folder_of(const fs::path& run) {
  const fs::path folder = fs::absolute(fs::is_directory(run) ? run : run.parent_path()).lexically_normal();
  return folder.has_filename() ? folder : folder.parent_path();
}

fs::path metrics_of(const fs::path& run) {
  return fs::is_directory(run) ? run / "metrics.jsonl" : run;
}

// The last `length` parts of a path, all of it where it has fewer.
fs::path tail_of(const fs::path& path, std::ptrdiff_t length) {
  fs::path tail;
  for (auto part = std::next(path.begin(),
                             std::max<std::ptrdiff_t>(0, std::distance(path.begin(), path.end()) - length));
       part != path.end(); ++part)
    tail /= *part;
  return tail;
}

double between(double a, double b, double share) {
  return a + (b - a) * share;
}

Spent between(const Spent& a, const Spent& b, double share) {
  return {between(a.tokens, b.tokens, share), between(a.flops, b.flops, share),
          between(a.seconds, b.seconds, share)};
}

// Of one line, by key; `where` is "file:line".
double number(const json& line, const char* key, const std::string& where) {
  const auto it = line.find(key);
  if (it == line.end() || !it->is_number())
    fail(ExitCode::kBadInput, "{}: no number '{}'; expected a line that `upmoe train` wrote", where, key);
  return it->get<double>();
}

// Nan where the line has null, which is how JSON says of a step or an evaluation that its loss was not finite.
double loss_of(const json& line, const char* key, const std::string& where) {
  const auto it = line.find(key);
  if (it != line.end() && it->is_null()) return std::numeric_limits<double>::quiet_NaN();
  return number(line, key, where);
}

// Each point with the mean of as many neighbours on both sides as there are, at most `most`: a straight line stays
// what it is.
std::vector<CurvePoint> smoothed(const std::vector<CurvePoint>& points, std::size_t most) {
  std::vector<CurvePoint> out = points;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const std::size_t reach = std::min({most, i, points.size() - 1 - i});
    double sum = 0;
    for (std::size_t j = i - reach; j <= i + reach; ++j) sum += points[j].loss;
    out[i].loss = sum / static_cast<double>(2 * reach + 1);
  }
  return out;
}

struct Reader {
  Spent spent;
  double step = 0, teacher_flops = 0;
  bool counts_experts = false;
  std::vector<CurvePoint> training, evaluations;
  bool has_evaluations() const { return evaluations.size() > 1; }
  std::vector<double> behind;  // the steps of the last evaluations, behind the last step that was logged

  void add(const json& line, const std::string& where) {
    if (line.value("kind", "") == "eval") {
      Spent so_far = spent;
      so_far.tokens = number(line, "tokens", where);
      evaluations.push_back({so_far, loss_of(line, "eval_loss", where)});
      if (const double at = number(line, "step", where); at > step) behind.push_back(at);
      return;
    }
    if (!line.contains("loss")) return;
    const double at = number(line, "step", where), steps = at - step;
    if (steps <= 0)
      fail(ExitCode::kBadInput, "{}: step {} follows step {}; expected each step once, in order", where, at,
           step);
    const double ranks = number(line, "ranks", where),
                 taught = line.contains("flops_teacher") ? number(line, "flops_teacher", where) : 0;
    const Spent before = spent;
    spent +=
        {number(line, "tokens", where) - spent.tokens,
         steps * (number(line, "flops", where) + taught) * ranks, steps * number(line, "seconds", where)};
    teacher_flops += steps * taught * ranks;
    place_evaluations(before, at);
    step = at;
    training.push_back({spent, loss_of(line, "loss", where)});
    counts_experts = counts_experts || line.contains("expert_load");
  }

  // Between the step that was logged last, with `before`, and the one at `now` all cost the same.
  void place_evaluations(const Spent& before, double now) {
    auto point = evaluations.end() - static_cast<std::ptrdiff_t>(behind.size());
    for (const double at : behind) {
      const Spent there = between(before, spent, std::min(1.0, (at - step) / (now - step)));
      point->spent.flops = there.flops;
      (point++)->spent.seconds = there.seconds;
    }
    behind.clear();
  }
};

// Those with a loss. The last one is what a run has come to.
std::vector<CurvePoint> finite(std::vector<CurvePoint> points, const fs::path& file) {
  if (!std::isfinite(points.back().loss))
    fail(ExitCode::kBadInput,
         "{}: the last loss is not finite; the run has come to none that could be compared", file.string());
  std::erase_if(points, [](const CurvePoint& p) { return !std::isfinite(p.loss); });
  return points;
}

Reader read_metrics(const fs::path& run) {
  const fs::path file = metrics_of(run);
  std::ifstream in(file);
  if (!in)
    fail(ExitCode::kBadInput,
         "{}: cannot be read; expected the directory of a run of `upmoe train`, with its metrics.jsonl",
         file.string());
  Reader reader;
  std::int64_t number_of_line = 0;
  for (std::string text; std::getline(in, text);) {
    const std::string where = fmt::format("{}:{}", file.string(), ++number_of_line);
    const json line = json::parse(text, nullptr, false);
    // The last line of a run that was killed, or is still going.
    const bool torn = line.is_discarded() && in.eof();
    if (torn) break;
    if (!line.is_object())
      fail(ExitCode::kBadInput, "{}: is no JSON object; expected a line of metrics", where);
    reader.add(line, where);
  }
  if (reader.training.empty())
    fail(ExitCode::kBadInput, "{}: has no step with a loss; nothing to compare", file.string());
  return reader;
}

RunCurve curve_of(const fs::path& run, const Reader& read, bool held_out) {
  RunCurve curve;
  curve.name = folder_of(run).filename().string();
  curve.spent = read.spent;
  curve.teacher_flops = read.teacher_flops;
  curve.counts_experts = read.counts_experts;
  curve.held_out = held_out;
  curve.points = finite(held_out ? read.evaluations : read.training, metrics_of(run));
  if (!held_out) curve.points = smoothed(curve.points, curve.points.size() / 50);
  return curve;
}

}  // namespace

Spent& Spent::operator+=(const Spent& other) {
  tokens += other.tokens;
  flops += other.flops;
  seconds += other.seconds;
  return *this;
}

RunCurve read_run_curve(const fs::path& run) {
  const Reader read = read_metrics(run);
  return curve_of(run, read, read.has_evaluations());
}

std::vector<RunCurve> read_run_curves(const std::vector<std::string>& runs) {
  std::vector<Reader> all;
  std::vector<fs::path> folders;
  for (const std::string& run : runs) {
    all.push_back(read_metrics(run));
    folders.push_back(folder_of(run));
  }
  const bool held_out =
      std::all_of(all.begin(), all.end(), [](const Reader& r) { return r.has_evaluations(); });
  std::vector<RunCurve> curves;
  for (std::size_t i = 0; i < runs.size(); ++i) curves.push_back(curve_of(runs[i], all[i], held_out));
  for (std::size_t i = 0; i < runs.size(); ++i) {
    std::ptrdiff_t length = 1;
    const auto shared = [&](const fs::path& other) {
      return other != folders[i] && tail_of(other, length) == tail_of(folders[i], length);
    };
    while (std::any_of(folders.begin(), folders.end(), shared)) ++length;
    curves[i].name = tail_of(folders[i], length).string();
  }
  return curves;
}

std::optional<Arrival> spent_at(const RunCurve& curve, double loss) {
  const auto reached = [&](const CurvePoint& p) { return p.loss <= loss; };
  const auto at = std::find_if(curve.points.begin(), curve.points.end(), reached);
  if (at == curve.points.end()) return std::nullopt;
  if (at == curve.points.begin()) return Arrival{at->spent, true};
  const CurvePoint& before = *(at - 1);
  return Arrival{between(before.spent, at->spent, (before.loss - loss) / (before.loss - at->loss))};
}

}  // namespace upmoe
