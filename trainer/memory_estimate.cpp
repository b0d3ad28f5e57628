#include "trainer/memory_estimate.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>

#include "kernels/core/log.h"
#include "parallel/control_group.h"
#include "parallel/host.h"
#include "trainer/checkpoint.h"
#include "trainer/dry_model.h"

namespace upmoe {

namespace {

constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;

// All micro-batches that a stage has under way at once.
double activations_of(const Session& s) {
  const MeshSpec& mesh = s.mesh.spec();
  DryModel dry(s.run, s.config, {s.run.train.micro_batch, s.params.compute_dtype(), s.run.train.recompute});
  std::map<bool, double> kept;  // by whether it is a mixture: blocks of a kind are alike
  double own = 0;
  for (const Transformer& chunk : s.chunks)
    for (std::size_t i = 0; i < chunk.blocks.size(); ++i) {
      const int block = chunk.first_block + static_cast<int>(i);
      double& bytes = kept[s.config.is_moe_layer(block)];
      if (bytes == 0) {
        dry.block(static_cast<std::size_t>(block));
        bytes = static_cast<double>(dry.kept_bytes);
      }
      own += bytes;
    }
  dry.head();
  return (own * mesh.pp + static_cast<double>(dry.scratch_bytes())) / (mesh.tp * mesh.cp);
}

std::string read(const char* path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

MemoryEstimate estimate_memory(const Session& s) {
  MemoryEstimate e;
  e.weights_and_gradients = static_cast<double>(s.params.bytes());
  e.optimizer = static_cast<double>(s.optimizer.bytes());
  e.checkpoint = static_cast<double>(CheckpointWriter::bytes_of(s));
  e.activations = activations_of(s);
  return e;
}

std::string describe(const MemoryEstimate& e) {
  return fmt::format(
      "{:.2f} GiB (weights and gradients {:.2f}, optimizer {:.2f}, activations {:.2f}, copy for a checkpoint "
      "{:.2f})",
      e.total() / kGiB, e.weights_and_gradients / kGiB, e.optimizer / kGiB, e.activations / kGiB,
      e.checkpoint / kGiB);
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

void warn_of_memory(const Session& session, Communicator& world) {
  if (session.memory.exec.device.type != DeviceType::kCpu) return;  // a GPU's memory tells by itself
  const MemoryEstimate mine = estimate_memory(session);
  const std::vector<std::int64_t> hosts = hosts_of(world);
  const std::vector<std::int64_t> needs = gather(world, static_cast<std::int64_t>(mine.total()));
  const std::int64_t here = hosts[static_cast<std::size_t>(world.rank())];
  if (std::find(hosts.begin(), hosts.end(), here) - hosts.begin() != world.rank()) return;
  double need = 0;
  int ranks = 0;
  for (std::size_t r = 0; r < hosts.size(); ++r) {
    if (hosts[r] != here) continue;
    need += static_cast<double>(needs[r]);
    ++ranks;
  }
  const double left = memory_left("/sys/fs/cgroup", read("/proc/self/cgroup"), read("/proc/meminfo"));
  if (left == 0 || need <= left) return;
  log::warning(
      "this host has {:.2f} GiB of memory left, and its {} rank{} will need about {:.2f}, of which this one "
      "{}: it may be killed (status 137). Lower train.micro_batch, set train.recompute: block, "
      "optimizer.name: adamw8bit or parallel.zero: 2, or use more hosts",
      left / kGiB, ranks, ranks == 1 ? "" : "s", need / kGiB, describe(mine));
}

}  // namespace upmoe
