#pragma once
// Whether a run fits into the memory of its host, before it takes it.

#include <string>

#include "parallel/communicator.h"
#include "trainer/session.h"

namespace upmoe {

// Bytes of one rank, by a rehearsal: a balanced router, and without what the backend of a device takes inside ops.
struct MemoryEstimate {
  MemoryUse step;
  std::size_t checkpoint = 0;  // the copy that is written in the background
  std::size_t total() const { return step.total() + checkpoint; }
};
// Micro-batches of a rank after which all are under way that ever are.
std::int64_t rounds_until_full(const RunConfig::Parallel& parallel);
MemoryEstimate estimate_memory(const RunConfig& run, const ModelConfig& model, int rank, int ranks);
std::string describe(const MemoryEstimate& estimate);  // "3.2 GiB (weights and gradients 1.1, ...)"

// Bytes that processes of this host may still take: what the kernel calls available, or what is left of the limit of
// a container, whatever is less. `root` and `own` as in quota_of_container(), `meminfo` the text of /proc/meminfo.
double memory_left(const std::string& root, const std::string& own, const std::string& meminfo);
double memory_left();  // of this host; 0: it does not say

// Warns, once per host, when its ranks together will need more than is left. Before weights are loaded. Collective.
void warn_of_memory(const Session& session, Communicator& world);

}  // namespace upmoe
