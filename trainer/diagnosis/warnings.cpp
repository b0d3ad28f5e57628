#include "trainer/diagnosis/warnings.h"

#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "parallel/host.h"

namespace upmoe {

namespace {

HostPlace place_in(Communicator& world) {
  return place_among(hosts_of(world), world.rank());
}

Surroundings seen_from(const HostPlace& place, const Communicator& world) {
  return {.ranks = world.size(), .ranks_here = place.ranks_here, .hosts = place.hosts, .gpus = gpu::count()};
}

}  // namespace

Surroundings surroundings_of(Communicator& world) {
  return seen_from(place_in(world), world);
}

void warn_of_machine(Communicator& world, const std::filesystem::path& folder) {
  const HostPlace place = place_in(world);
  if (!place.speaks) return;
  std::vector<Finding> findings = findings_of(read_host(), seen_from(place, world));
  if (world.rank() == 0) {
    try {
      const std::vector<Finding> of_folder = findings_of(read_folder(folder, read_mounts()));
      findings.insert(findings.end(), of_folder.begin(), of_folder.end());
    } catch (const Error&) {  // a run that cannot make its folder says so itself
    }
  }
  for (const Finding& f : findings)
    if (f.severity != Severity::kNote) log::warning("{}", f.words);
}

}  // namespace upmoe
