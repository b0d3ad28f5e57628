// Barriers in shared memory on the CPU: phases, arrivals, bytes, and who knows of a barrier at all.

#include "tests/support/fake_cuda/sm90_emulation.h"
#include "tests/support/fake_cuda/sm90_machine.h"

namespace sm90_twin {

namespace {

constexpr std::int64_t kMost = (1 << 20) - 1;  // of the arrivals that a barrier counts, and of its bytes

}  // namespace

void Barrier::arrive(const char* who) {
  if (pending == 0) fail(std::string(who) + ": more arrivals in a phase than the barrier counts");
  --pending;
  settle();
}
void Barrier::expect(std::int64_t more, const char* who) {
  bytes += more;
  if (bytes > kMost || bytes < -kMost) fail(std::string(who) + ": more bytes than a barrier counts");
}
void Barrier::settle() {
  if (pending != 0 || bytes != 0) return;
  ++phase;
  pending = count;
}

Barrier& Block::barrier(std::size_t at, const char* who) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail(std::string(who) + ": no barrier was made here");
  return found->second;
}
Barrier& Block::shown_barrier(std::size_t at, const char* who) {
  Barrier& found = barrier(at, who);
  if (!found.shown)
    fail(std::string(who) + ": thread " + std::to_string(found.maker) +
         " has not shown the barrier that it made (fence.mbarrier_init)");
  return found;
}

}  // namespace sm90_twin

namespace upmoe::cuda::sm90 {

using namespace sm90_twin;

void mbarrier_init(u64* bar, u32 count) {
  Block& block = cluster().block();
  if (count == 0 || count > kMost) fail("mbarrier.init: " + std::to_string(count) + " arrivals");
  block.barriers[block.place(bar, 8, "mbarrier.init")] = {
      .count = count, .pending = count, .maker = cluster().lane().index};
}
void fence_mbarrier_init() {
  for (auto& [at, barrier] : cluster().block().barriers)
    barrier.shown = barrier.shown || barrier.maker == cluster().lane().index;
}
void mbarrier_arrive(u64* bar) {
  Block& block = cluster().block();
  block.barrier(block.place(bar, 8, "mbarrier.arrive"), "mbarrier.arrive").arrive("mbarrier.arrive");
}
void mbarrier_arrive_expect_tx(u64* bar, u32 bytes) {
  Block& block = cluster().block();
  Barrier& barrier = block.barrier(block.place(bar, 8, "expect_tx"), "expect_tx");
  barrier.expect(bytes, "expect_tx");
  barrier.arrive("expect_tx");
}
void mbarrier_arrive_remote(u64* bar, u32 rank) {
  const std::size_t at = cluster().block().place(bar, 8, "mbarrier.arrive");
  if (rank >= cluster().blocks.size()) fail("mbarrier.arrive: no such block in the cluster");
  Block& there = *cluster().blocks[rank];
  if (there.alive == 0) fail("mbarrier.arrive at a block of the cluster that has left");
  there.shown_barrier(at, "mbarrier.arrive at another block").arrive("mbarrier.arrive at another block");
}
void mbarrier_wait(u64* bar, u32 parity) {
  Block& block = cluster().block();
  const std::size_t at = block.place(bar, 8, "mbarrier.try_wait");
  Barrier& barrier = block.barrier(at, "mbarrier.try_wait");
  cluster().wait_for_change(barrier.phase, 1, parity, [&barrier, parity, at] {
    return "wait for the phase of parity " + std::to_string(parity) + " of the barrier at byte " +
           std::to_string(at) + ", which lacks " + std::to_string(barrier.pending) + " arrivals and " +
           std::to_string(barrier.bytes) + " bytes";
  });
}

}  // namespace upmoe::cuda::sm90
