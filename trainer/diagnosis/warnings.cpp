#include "trainer/diagnosis/warnings.h"

#include <algorithm>
#include <set>

#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "parallel/host.h"

namespace upmoe {

Surroundings surroundings_of(Communicator& world) {
  const std::vector<std::int64_t> hosts = hosts_of(world);
  const std::int64_t here = hosts[static_cast<std::size_t>(world.rank())];
  return {.ranks = world.size(),
          .ranks_here = static_cast<int>(std::count(hosts.begin(), hosts.end(), here)),
          .hosts = static_cast<int>(std::set<std::int64_t>(hosts.begin(), hosts.end()).size()),
          .gpus = gpu::count(),
          .speaks = std::find(hosts.begin(), hosts.end(), here) - hosts.begin() == world.rank()};
}

void warn_of_machine(Communicator& world, const std::filesystem::path& folder) {
  const Surroundings where = surroundings_of(world);
  if (!where.speaks) return;
  std::vector<Finding> findings = findings_of(read_host(), where);
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
