#include "configs/nearest_meshes.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "configs/run_problems.h"

namespace upmoe {
namespace {

constexpr std::int64_t kMostFactor = 8;  // how far an axis may move from what was asked for

std::vector<int> divisors_near(int n, int asked) {
  std::vector<int> all;
  for (int d = 1; d <= n; ++d)
    if (n % d == 0 && (d == 1 || (d <= asked * kMostFactor && asked <= d * kMostFactor))) all.push_back(d);
  return all;
}

std::array<int, 5> axes_of(const RunConfig::Parallel& p) {
  return {p.pp, p.cp, p.tp, p.ep, p.etp};
}

// How often axes double or halve on the way from one to the other.
double distance(const RunConfig::Parallel& a, const RunConfig::Parallel& b) {
  double sum = 0;
  const auto of_a = axes_of(a), of_b = axes_of(b);
  for (std::size_t i = 0; i < of_a.size(); ++i) sum += std::abs(std::log2(double(of_a[i]) / of_b[i]));
  return sum;
}

// `asked` with the axes of `mesh`, and without what these forbid.
RunConfig::Parallel with_axes(RunConfig::Parallel asked, const RunConfig::Parallel& mesh) {
  asked.pp = mesh.pp, asked.cp = mesh.cp, asked.tp = mesh.tp, asked.ep = mesh.ep, asked.etp = mesh.etp;
  if (asked.pp == 1) asked.pp_chunks = 1;
  if (asked.node_ranks > 0 && (asked.ep % asked.node_ranks != 0 || asked.etp > 1)) asked.node_ranks = 0;
  return asked;
}

}  // namespace

std::vector<std::string> nearest_meshes(const RunConfig& run, const ModelConfig& model, int world_size,
                                        std::size_t most) {
  struct Found {
    double distance;
    RunConfig::Parallel mesh;
  };
  RunConfig::Parallel asked = run.parallel;
  for (int* axis : {&asked.pp, &asked.cp, &asked.tp, &asked.ep, &asked.etp}) *axis = std::max(1, *axis);
  std::vector<Found> found;
  const auto near = [&](int n, int RunConfig::Parallel::*axis) { return divisors_near(n, asked.*axis); };
  for_each_mesh(std::max(1, world_size), near, [&](const RunConfig::Parallel& axes) {
    const RunConfig::Parallel mesh = with_axes(asked, axes);
    // Possible, and a waste: what is possible with it is so with ep 1.
    if (ranks_without_experts(mesh, model) > 0) return;
    const double d = distance(mesh, asked);
    // First by distance, which is cheap, then by whether the run would be possible.
    if (found.size() == most && d >= found.back().distance) return;
    RunConfig other = run;
    other.parallel = mesh;
    if (!problems_of(other, model, world_size).empty()) return;
    const auto at = std::upper_bound(found.begin(), found.end(), d,
                                     [](double value, const Found& f) { return value < f.distance; });
    found.insert(at, {d, mesh});
    if (found.size() > most) found.pop_back();
  });
  std::vector<std::string> texts;
  for (const Found& f : found)
    texts.push_back(fmt::format("tp {}, pp {}, cp {}, ep {}, etp {} (dp {})", f.mesh.tp, f.mesh.pp, f.mesh.cp,
                                f.mesh.ep, f.mesh.etp, f.mesh.replicas(world_size)));
  return texts;
}

void require_possible(const RunConfig& run, const ModelConfig& model, int world_size) {
  const std::vector<std::string> problems = problems_of(run, model, world_size);
  if (problems.empty()) return;
  std::string all = listed(problems);
  const std::vector<std::string> near = nearest_meshes(run, model, world_size);
  if (!near.empty()) all += fmt::format("\npossible meshes of {} ranks, the nearest first:", world_size);
  all += listed(near);
  fail(ExitCode::kUsage, "{}: this run is not possible:{}", run.origin, all);
}

}  // namespace upmoe
