#include "trainer/memory_estimate.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "kernels/core/log.h"
#include "parallel/control_group.h"
#include "parallel/host.h"
#include "trainer/checkpoint.h"
#include "trainer/rehearsal.h"

namespace upmoe {

namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

RunConfig shortened(RunConfig run, int ranks) {
  const std::int64_t enough =
      checked_mul(rounds_until_full(run.parallel) * mesh_of(run, ranks).dp, run.train.micro_batch);
  run.train.global_batch = std::min(run.train.global_batch, enough);
  return run;
}

}  // namespace

// Where chunks are interleaved, until the arenas of micro-batches, fewer than this multiple of the stages, have gone
// round to the chunk that takes the most.
std::int64_t rounds_until_full(const RunConfig::Parallel& parallel) {
  const std::int64_t pp = parallel.pp, chunks = parallel.pp_chunks;
  return chunks == 1 ? pp : pp * (chunks + 2) * pp;
}

MemoryEstimate estimate_memory(const RunConfig& run, const ModelConfig& model, int rank, int ranks) {
  Rehearsal rehearsal(shortened(run, ranks), model, rank, ranks);
  rehearsal.step();
  return {rehearsal.memory_use(), CheckpointWriter::bytes_of(rehearsal.session())};
}

std::string describe(const MemoryEstimate& e) {
  const auto gib = [](std::size_t bytes) { return static_cast<double>(bytes) / kGiB; };
  return fmt::format(
      "{:.2f} GiB (weights and gradients {:.2f}{}, optimizer {:.2f}, activations {:.2f}, buckets {:.2f}, "
      "copy for a checkpoint {:.2f})",
      gib(e.total()), gib(e.step.parameters + e.step.gradients),
      e.step.teacher > 0 ? fmt::format(", the teacher's {:.2f}", gib(e.step.teacher)) : "",
      gib(e.step.optimizer), gib(e.step.activations + e.step.scratch), gib(e.step.buckets),
      gib(e.checkpoint));
}

double memory_left(const std::string& root, const std::string& own, const std::string& meminfo) {
  double left = 0;
  const std::string key = "MemAvailable:";
  if (const std::size_t at = meminfo.find(key); at != std::string::npos)
    left = 1024.0 * std::atof(meminfo.c_str() + at + key.size());
  for (const std::filesystem::path& group : control_groups(root, own, "memory")) {
    double limit = 0, used = 0, cached = 0;
    if (!(std::ifstream(group / "memory.max") >> limit) &&
        !(std::ifstream(group / "memory.limit_in_bytes") >> limit))
      continue;  // "max": no limit
    if (!(std::ifstream(group / "memory.current") >> used))
      std::ifstream(group / "memory.usage_in_bytes") >> used;
    std::ifstream stat(group / "memory.stat");  // pages of files go when others want them
    for (std::string name; stat >> name;) {
      double value = 0;
      stat >> value;
      if (name == "inactive_file" || name == "active_file") cached += value;
    }
    left = std::min(left, std::max(0.0, limit - std::max(0.0, used - cached)));
  }
  return left;
}

double memory_left() {
  return memory_left("/sys/fs/cgroup", system_text("/proc/self/cgroup"), system_text("/proc/meminfo"));
}

void warn_of_memory(const Session& session, Communicator& world) {
  if (session.memory.exec.device.type != DeviceType::kCpu) return;  // a GPU's memory tells by itself
  RunConfig run = session.run;
  run.device = DeviceChoice::kCpu;  // as it was chosen
  const MemoryEstimate mine = estimate_memory(run, session.config, world.rank(), world.size());
  const std::vector<std::int64_t> hosts = hosts_of(world);
  const std::vector<std::int64_t> needs = gather(world, static_cast<std::int64_t>(mine.total()));
  const HostPlace place = place_among(hosts, world.rank());
  if (!place.speaks) return;
  const std::int64_t here = hosts[static_cast<std::size_t>(world.rank())];
  double need = 0;
  for (std::size_t r = 0; r < hosts.size(); ++r)
    if (hosts[r] == here) need += static_cast<double>(needs[r]);
  const double left = memory_left();
  if (left == 0 || need <= left) return;
  log::warning(
      "this host has {:.2f} GiB of memory left, and its {} rank{} will need about {:.2f}, of which this one "
      "{}: it may be killed (status 137). Lower train.micro_batch, set train.recompute: block, "
      "optimizer.name: adamw8bit or parallel.zero: 2, or use more hosts",
      left / kGiB, place.ranks_here, place.ranks_here == 1 ? "" : "s", need / kGiB, describe(mine));
}

}  // namespace upmoe
