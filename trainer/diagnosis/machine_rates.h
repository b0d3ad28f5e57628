#pragma once
// What the ranks of this job reach, measured: the numbers of a machine's file (configs/machine.h, docs/plan.md).

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "configs/machine.h"
#include "parallel/communicator.h"
#include "trainer/op_speed.h"

namespace upmoe {

// What is measured, and how long. A test asks for less.
struct Effort {
  std::vector<double> edges_on_cpu{64, 128, 256, 512, 1024};
  std::vector<double> edges_on_gpu{256, 512, 1024, 2048, 4096, 8192};
  Bursts bursts{.count = 3, .seconds = 0.1};
  std::int64_t copied_elements = std::int64_t{1} << 24;  // of each of three fp32 tensors; 64 MiB
  std::vector<std::int64_t> sent_bytes{4096, 65536, 1 << 20, 16 << 20};  // by each rank, to all
  std::uint64_t disk_bytes = std::uint64_t{256} << 20;                   // by all ranks of a host together
};

// One size of a transfer among the ranks of a host, or among hosts.
struct TransferTime {
  std::string link, verb;
  std::int64_t bytes = 0;
  double seconds = 0;
  double bytes_per_s = 0;  // that one rank sends
};

struct MeasuredMachine {
  Machine machine;                      // without name, source, sizes of memory; four digits
  std::vector<TransferTime> transfers;  // empty for one rank, which has nobody to send to
};

double four_digits(double x);  // more are noise

// Peaks are the fastest that was seen, rates what is usual: products and attention, forward and backward, on operands
// that no cache has kept. All ranks compute at the same time: on CPUs rates are those of a host, whose ranks share
// them; on GPUs those of one.
// `folder` exists, and is written to. `tell` gets a word before each part, on every rank. Collective; the same
// result on all.
MeasuredMachine measure_machine(Communicator& world, Device device, const std::filesystem::path& folder,
                                const Effort& effort, const std::function<void(const std::string&)>& tell);

}  // namespace upmoe
