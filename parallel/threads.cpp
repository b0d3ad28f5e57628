#include "parallel/threads.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "parallel/control_group.h"
#include "parallel/host.h"

namespace upmoe {

namespace {

constexpr std::size_t kWords = 64;  // 4,096 processors of a host
using Mask = std::array<std::int64_t, kWords>;

bool has(const Mask& mask, std::size_t cpu) {
  return (static_cast<std::uint64_t>(mask[cpu / 64]) >> (cpu % 64) & 1u) != 0;
}

Mask own_mask() {
  Mask mask{};
  static_assert(sizeof(Mask) >= sizeof(cpu_set_t));
  if (sched_getaffinity(0, sizeof mask, reinterpret_cast<cpu_set_t*>(mask.data())) != 0) mask = {1};
  return mask;
}

int told_threads() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  return text == nullptr ? 0 : std::max(0, std::atoi(text));
}

std::atomic<int> chosen = 0;  // ranks may be threads

void use_threads(int threads) {
  chosen = threads;
#ifdef _OPENMP
  omp_set_num_threads(threads);
#endif
}

// "quota period" or "max period" of version 2, two files of version 1.
double quota_in(const std::filesystem::path& folder) {
  double quota = 0, period = 0;
  std::ifstream both(folder / "cpu.max");
  if (both >> quota >> period && period > 0) return quota / period;
  std::ifstream first(folder / "cpu.cfs_quota_us"), second(folder / "cpu.cfs_period_us");
  if (first >> quota && second >> period && quota > 0 && period > 0) return quota / period;
  return 0;
}

}  // namespace

double quota_of_container(const std::string& root, const std::string& own) {
  double least = 0;
  for (const std::filesystem::path& group : control_groups(root, own, "cpu")) {
    const double found = quota_in(group);
    if (found > 0) least = least == 0 ? found : std::min(least, found);
  }
  return least;
}

CoreShare share_cores(Communicator& world) {
  const auto ranks = static_cast<std::size_t>(world.size()), me = static_cast<std::size_t>(world.rank());
  const std::vector<std::int64_t> hosts = hosts_of(world);
  std::vector<Mask> masks(ranks);
  const Mask mine = own_mask();
  world
      .all_gather(host_view(masks.front().data(), {static_cast<std::int64_t>(ranks * kWords)}),
                  host_view(mine.data(), {static_cast<std::int64_t>(kWords)}))
      .wait();

  CoreShare share;
  const HostPlace place = place_among(hosts, world.rank());
  share.ranks_here = place.ranks_here;
  share.speaks = place.speaks;
  double part = 0;
  share.cores = share.bound_to = 0;
  for (std::size_t cpu = 0; cpu < kWords * 64; ++cpu) {
    int sharing = 0;
    for (std::size_t r = 0; r < ranks; ++r) sharing += hosts[r] == hosts[me] && has(masks[r], cpu);
    share.cores += sharing > 0;
    if (!has(mine, cpu)) continue;
    ++share.bound_to;
    // A core that several ranks of this host may use counts as an equal part for each of them:
    //
    //   4 cores, 2 ranks unbound    each 4 x 1/2 = 2 threads
    //   4 cores, 2 ranks on 2 each  each 2 x 1   = 2 threads
    part += 1.0 / sharing;
  }
  share.is_bound = share.bound_to < share.cores;
  if (const double quota = quota_of_container("/sys/fs/cgroup", system_text("/proc/self/cgroup"));
      quota > 0) {
    share.cores = std::min(share.cores, std::max(1, static_cast<int>(quota)));
    part = std::min(part, quota / share.ranks_here);
  }
  share.was_told = told_threads() > 0;
  share.threads = share.was_told ? told_threads() : std::max(1, static_cast<int>(part + 1e-9));
  if (!share.was_told) use_threads(share.threads);
  return share;
}

int rank_threads() {
  const int shared = chosen;
  return shared > 0 ? shared : std::max(1, told_threads());
}

std::string describe(const CoreShare& share) {
  const auto several = [](int n, const char* what) {
    return fmt::format("{} {}{}", n, what, n == 1 ? "" : "s");
  };
  return fmt::format("{} x {} on {}{}", several(share.ranks_here, "rank"), several(share.threads, "thread"),
                     several(share.cores, "core"),
                     share.is_bound ? fmt::format(", each rank bound to {}", share.bound_to) : "");
}

std::string complaint(const CoreShare& share) {
  const int room = share.is_bound ? share.bound_to : share.cores;
  if (share.ranks_here * share.threads <= share.cores && share.threads <= room) return "";
  std::string advice;
  if (share.ranks_here > share.cores) {
    advice = "start fewer ranks on it";
  } else if (share.was_told) {
    advice = "leave OMP_NUM_THREADS to the program, which shares the cores out";
  } else {
    advice = "let the launcher bind the ranks to different cores, or not at all (--bind-to none)";
  }
  return fmt::format("this host has fewer cores than threads that compute, which is slow: {}; {}",
                     describe(share), advice);
}

#ifdef _OPENMP
ComputesAlone::ComputesAlone() : before_(omp_get_max_threads()) {
  omp_set_num_threads(1);
}
ComputesAlone::~ComputesAlone() {
  omp_set_num_threads(before_);
}
#else
ComputesAlone::ComputesAlone() : before_(1) {}
ComputesAlone::~ComputesAlone() = default;
#endif

void bound_spinning() {
#ifdef _OPENMP
  // How long: some hundred microseconds, longer than nearly every pause between two ops and far shorter than
  // a turn of the scheduler. Fewer turns cost an idle machine more, more cost a busy one more:
  // tests/bench/busy_machine.py --spins tries others.
  constexpr const char* kTurns = "10000";
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  std::ifstream file("/proc/self/cmdline");
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  std::vector<char*> arguments;
  for (std::string& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);
  // libgomp reads its variables before main(), so the program starts itself anew with them.
  if (words.empty() || setenv("GOMP_SPINCOUNT", kTurns, 1) != 0) return;
  // By its name where that still is this program, so that tools show it.
  std::error_code error;
  const std::filesystem::path self = "/proc/self/exe", name = std::filesystem::read_symlink(self, error);
  execv((!error && std::filesystem::equivalent(self, name, error) ? name : self).c_str(), arguments.data());
  // Refused: then the threads wait as the OpenMP library has them wait.
#endif
}

}  // namespace upmoe
