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

// Each axis takes what those before it leave of the ranks. ep and etp divide a stage's ranks, pp, cp and tp all of
// them; what remains is dp.
template <class Visit>
void for_each_mesh(int world, const RunConfig::Parallel& asked, const Visit& visit) {
  for (const int pp : divisors_near(world, asked.pp))
    for (const int cp : divisors_near(world / pp, asked.cp))
      for (const int tp : divisors_near(world / pp / cp, asked.tp))
        for (const int ep : divisors_near(world / pp, asked.ep))
          for (const int etp : divisors_near(world / pp / ep, asked.etp)) {
            RunConfig::Parallel mesh = asked;
            mesh.pp = pp, mesh.cp = cp, mesh.tp = tp, mesh.ep = ep, mesh.etp = etp;
            if (pp == 1) mesh.pp_chunks = 1;
            if (mesh.node_ranks > 0 && (ep % mesh.node_ranks != 0 || etp > 1)) mesh.node_ranks = 0;
            visit(mesh);
          }
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
  for_each_mesh(std::max(1, world_size), asked, [&](const RunConfig::Parallel& mesh) {
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
                                f.mesh.ep, f.mesh.etp, world_size / (f.mesh.tp * f.mesh.pp * f.mesh.cp)));
  return texts;
}

void require_possible(const RunConfig& run, const ModelConfig& model, int world_size) {
  const std::vector<std::string> problems = problems_of(run, model, world_size);
  if (problems.empty()) return;
  std::string all;
  for (const std::string& p : problems) all += "\n  " + p;
  const std::vector<std::string> near = nearest_meshes(run, model, world_size);
  if (!near.empty()) all += fmt::format("\npossible meshes of {} ranks, the nearest first:", world_size);
  for (const std::string& mesh : near) all += "\n  " + mesh;
  fail(ExitCode::kUsage, "{}: this run is not possible:{}", run.origin, all);
}

}  // namespace upmoe
