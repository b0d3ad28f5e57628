#include "trainer/diagnosis/machine_facts.h"

#include <fmt/format.h>

#include <algorithm>

#include "trainer/diagnosis/machine_rates.h"

namespace upmoe {

void add_facts(Machine& machine, const MeasuredDevice& device, const HostFacts& host,
               const Surroundings& where) {
  if (device.gpu.empty()) {
    machine.name =
        fmt::format("{}, {} cores", host.processor.empty() ? "a processor" : host.processor, device.cores);
    machine.memory_gb = four_digits(host.memory * 1e-9);
    machine.ranks_per_node = device.cores;
    machine.overhead_gb = four_digits(host.resident * 1e-9);
  } else {
    machine.name = device.gpu;
    machine.memory_gb = four_digits(device.gpu_bytes * 1e-9);
    // A launcher may show each rank its own GPU alone, and a container a part of them.
    machine.ranks_per_node = std::max({host.gpus, where.gpus, where.ranks_here});
    machine.overhead_gb = 0;
  }
}

}  // namespace upmoe
