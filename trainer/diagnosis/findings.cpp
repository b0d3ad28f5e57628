#include "trainer/diagnosis/findings.h"

#include <algorithm>

namespace upmoe {

namespace {

constexpr double kMiB = 1024.0 * 1024.0, kGiB = 1024 * kMiB;
// What a process has open besides connections: libraries, token files, shards, pipes of the launcher.
constexpr std::uint64_t kFilesNeeded = 48, kFilesWanted = 256;
constexpr std::uint64_t kConnectionsOfAPeer = 2;
constexpr double kSharedMemoryOfARank = 16 * kMiB;  // Open MPI's and NCCL's buffers between ranks of a host
constexpr double kFewBytes = kGiB;

Finding warning(std::string words) {
  return {Severity::kWarning, ExitCode::kDone, std::move(words)};
}
Finding failure(ExitCode code, std::string words) {
  return {Severity::kFailure, code, std::move(words)};
}
Finding note(std::string words) {
  return {Severity::kNote, ExitCode::kDone, std::move(words)};
}

void judge_open_files(const ResourceLimit& limit, int ranks, std::vector<Finding>& out) {
  const std::uint64_t peers = kConnectionsOfAPeer * static_cast<std::uint64_t>(ranks - 1),
                      needed = kFilesNeeded + peers, wanted = kFilesWanted + peers;
  if (limit.soft >= wanted) return;
  const std::string cure =
      limit.hard >= wanted
          ? fmt::format("ulimit -n {} in the shell that starts it", wanted)
          : fmt::format("the hard limit is {}: raise nofile in /etc/security/limits.conf, or the container's",
                        limit.hard);
  if (limit.soft < needed)
    out.push_back(failure(ExitCode::kBadInput,
                          fmt::format("a process may have {} files open, and a rank of {} needs {}: {}",
                                      limit.soft, ranks, needed, cure)));
  else
    out.push_back(
        warning(fmt::format("a process may have {} files open, which a rank of {} "
                            "with many shards and token files may need more of: {}",
                            limit.soft, ranks, cure)));
}

void judge_shared_memory(const std::optional<double>& left, int ranks_here, std::vector<Finding>& out) {
  if (ranks_here == 1) return;
  const double wanted = kSharedMemoryOfARank * ranks_here;
  if (!left)
    out.push_back(
        warning(fmt::format("there is no /dev/shm, through which the {} ranks of "
                            "this host send to each other: mount a tmpfs there",
                            ranks_here)));
  else if (*left < wanted)
    out.push_back(warning(fmt::format(
        "/dev/shm has {:.0f} MiB left, and the {} ranks of this host may want {:.0f} to send to each other "
        "(else they end with a bus error): mount it larger, a container with --shm-size or --ipc=host",
        *left / kMiB, ranks_here, wanted / kMiB)));
}

void judge_locked_memory(const HostFacts& host, int hosts, std::vector<Finding>& out) {
  if (hosts == 1 || host.rdma_adapters == 0 || host.locked_memory.soft == kUnlimited) return;
  out.push_back(warning(fmt::format(
      "a process may lock {:.0f} MiB of memory, and the InfiniBand adapter here wants to lock what it sends: "
      "ulimit -l unlimited, or memlock in /etc/security/limits.conf",
      static_cast<double>(host.locked_memory.soft) / kMiB)));
}

void judge_gpus(const HostFacts& host, int usable, std::vector<Finding>& out) {
  if (host.gpus <= usable) return;
  out.push_back(
      usable == 0
          ? warning(
                fmt::format("this host has {} GPU{} that this program cannot use: see CUDA_VISIBLE_DEVICES, "
                            "the driver's age (580 or newer), and whether it was built with CUDA",
                            host.gpus, host.gpus == 1 ? "" : "s"))
          : note(fmt::format("{} of the {} GPUs of this host are shown to this process", usable, host.gpus)));
}

}  // namespace

std::vector<Finding> findings_of(const HostFacts& host, const Surroundings& where) {
  std::vector<Finding> out;
  judge_open_files(host.open_files, where.ranks, out);
  judge_shared_memory(host.shared_memory_left, where.ranks_here, out);
  judge_locked_memory(host, where.hosts, out);
  judge_gpus(host, where.gpus, out);
  if (host.memory_left > 0 && host.memory_left < kFewBytes)
    out.push_back(
        note(fmt::format("this host has {:.2f} GiB of memory left for its {} rank{}: end what else takes "
                         "it, or give the container more",
                         host.memory_left / kGiB, where.ranks_here, where.ranks_here == 1 ? "" : "s")));
  return out;
}

std::vector<Finding> findings_of(const FolderFacts& folder) {
  std::vector<Finding> out;
  const std::string where = folder.asked.string();
  if (folder.kind == "tmpfs" || folder.kind == "ramfs")
    out.push_back(
        warning(fmt::format("{} is in memory ({}): checkpoints take it from the run, and are gone with the "
                            "machine; name a run.dir on a disk",
                            where, folder.kind)));
  else if (folder.kind == "overlay")
    out.push_back(note(fmt::format(
        "{} is in the container's own layer: gone with it, unless run.dir lies on a volume", where)));
  if (folder.free_bytes < kFewBytes)
    out.push_back(
        note(fmt::format("{} has {:.2f} GiB free, and a checkpoint is 12 bytes a parameter and more: "
                         "remove something, or choose another disk",
                         where, folder.free_bytes / kGiB)));
  return out;
}

std::vector<Finding> findings_of(const FolderFacts& folder, const FolderTrial& trial) {
  std::vector<Finding> out = findings_of(folder);
  if (!trial.has_locks)
    out.push_back(
        warning(fmt::format("{} knows no locks: two jobs with one run.dir would not find each other; mount "
                            "it with locks (NFS: not nolock)",
                            folder.asked.string())));
  constexpr double kSlowSync = 1;
  if (std::max(trial.sync_s, trial.rename_s) > kSlowSync)
    out.push_back(
        warning(fmt::format("{} takes {:.1f} s to have a small file on the disk: each checkpoint waits for "
                            "it; choose another disk, or a larger checkpoint.every",
                            folder.asked.string(), std::max(trial.sync_s, trial.rename_s))));
  return out;
}

}  // namespace upmoe
