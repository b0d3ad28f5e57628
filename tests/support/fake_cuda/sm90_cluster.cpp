// What the blocks of a cluster do together, on the CPU.

#include <cstring>

#include "tests/support/fake_cuda/sm90_emulation.h"
#include "tests/support/fake_cuda/sm90_machine.h"

namespace upmoe::cuda::sm90 {

using namespace sm90_twin;

u32 cluster_rank() {
  return cluster().block().rank;
}
void cluster_arrive() {
  cluster().arrive_at_cluster();
}
void cluster_wait() {
  cluster().wait_for_cluster();
}
void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// It arrives as late as the thread's next barrier of the cluster; until then nothing of worth is there.
void store_remote(double* to, u32 rank, double value) {
  const char* who = "a store to another block of the cluster";
  Lane& lane = cluster().lane();
  const std::size_t at = lane.block->place(to, sizeof value, who);
  if (at % sizeof value != 0) fail(std::string(who) + ": the address is no multiple of 8");
  if (rank >= cluster().blocks.size()) fail(std::string(who) + ": there is no such block");
  Block* there = cluster().blocks[rank].get();
  if (there->late > 0) fail(std::string(who) + " that has not begun");
  if (there->alive == 0) fail(std::string(who) + " that has left");
  std::memset(there->base + at, 0xff, sizeof value);
  const OperationPtr store = make_operation(who, [=] {
    if (there->alive == 0) fail(std::string(who) + " that has left");
    std::memcpy(there->base + at, &value, sizeof value);
  });
  store->quiet = true;
  lane.remote_stores.push_back(store);
  cluster().begin(store);
}

}  // namespace upmoe::cuda::sm90
