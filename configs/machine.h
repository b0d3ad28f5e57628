#pragma once
// One kind of machine: what a maker's data sheet says of a device, and, where it is to be planned for, what programs
// reach on it and how its ranks are linked. configs/machines/*.yaml; docs/plan.md has every key.

#include <filesystem>
#include <string>
#include <vector>

namespace upmoe {

struct Machine {
  std::string name;            // for people
  std::string source;          // of the numbers
  double bf16_tflops = 0;      // dense products, 10^12 FLOP/s
  double memory_gb = 0;        // 10^9 bytes
  double memory_gb_per_s = 0;  // 10^9 bytes/s
  double peak_flops_per_s() const { return bf16_tflops * 1e12; }
  double bytes_per_s() const { return memory_gb_per_s * 1e9; }

  // What follows is needed for plans alone; 0 and empty: not said.
  double fp32_tflops = 0;        // peak of fp32 products, 10^12 FLOP/s
  int ranks_per_node = 1;        // GPUs, or processes of a CPU
  bool shared_by_ranks = false;  // memory, peaks and rates are of a node, whose ranks share them evenly
  double usable_gb = 0;          // of the memory, as the driver counts it, 10^9 bytes; 0: memory_gb
  double overhead_gb = 0;        // what a rank's process takes of the memory besides its tensors, 10^9 bytes

  // 10^12 FLOP/s that products reach, each list as long as `edges`, at these edges of a cube; between them along the
  // logarithm of the edge. A product of m x n x k counts as a cube of edge 3 / (1/m + 1/n + 1/k).
  struct Rates {
    std::string source;
    std::vector<double> edges;
    std::vector<double> gemm_bf16, gemm_fp32;  // dense products
    std::vector<double> grouped_bf16,
        grouped_fp32;  // all experts of a rank; the edge is that of one expert's
    double attention_forward_bf16 = 0, attention_backward_bf16 = 0;
    double attention_forward_fp32 = 0, attention_backward_fp32 = 0;
    double copy_gb_per_s = 0;  // read and written, of ops that are bound by memory
    double op_us = 0;          // of each call, besides
    // By how much the last of the ranks that compute the same is later than they are in the mean, as a share of the
    // time of computing: what they wait for each other.
    double skew = 0;
  } rates;

  struct Link {
    double gb_per_s = 0;    // 10^9 bytes/s that one rank sends while all do
    double latency_us = 0;  // of a message
    double overlap = 0;     // share of the computation beside which a transfer goes on, 0 to 1
  } inside_node, between_nodes;
  double disk_gb_per_s = 0;  // all ranks together
};

// Throws Error(kUsage) that lists every problem with file, line and the nearest valid key.
Machine read_machine(const std::filesystem::path& file);
// As read_machine reads it.
std::string to_yaml(const Machine& machine);

}  // namespace upmoe
