#pragma once
// What a maker's data sheet says of one device: configs/machines/*.yaml.

#include <filesystem>
#include <string>

namespace upmoe {

struct Machine {
  std::string name;            // for people
  std::string source;          // of the numbers
  double bf16_tflops = 0;      // dense products, 10^12 FLOP/s
  double memory_gb = 0;        // 10^9 bytes
  double memory_gb_per_s = 0;  // 10^9 bytes/s
  double peak_flops_per_s() const { return bf16_tflops * 1e12; }
  double bytes_per_s() const { return memory_gb_per_s * 1e9; }
};

// Throws Error(kUsage) that lists every problem with file, line and the nearest valid key.
Machine read_machine(const std::filesystem::path& file);

}  // namespace upmoe
