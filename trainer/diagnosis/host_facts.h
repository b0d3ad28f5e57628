#pragma once
// What a process may take of its host, as the kernel tells it in files.

#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>

namespace upmoe {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

struct ResourceLimit {  // as `ulimit` shows them: what holds, and how far it may be raised
  std::uint64_t soft = kUnlimited, hard = kUnlimited;
};

struct HostFacts {
  std::string processor;                     // "AMD EPYC 7B13"
  std::string allowed;                       // cores that this process may run on: "0-3,8"
  double quota = 0;                          // processors that the container grants; 0: all of them
  double memory = 0;                         // bytes of the host
  double memory_left = 0;                    // bytes that may still be taken, of host and container the less
  double resident = 0;                       // bytes that this process has in memory
  ResourceLimit open_files;                  // in number
  ResourceLimit locked_memory;               // bytes
  std::optional<double> shared_memory_left;  // bytes of /dev/shm; nothing where there is none
  std::string gpu_driver;                    // "580.82.07"; empty without one
  int gpus = 0;                              // that the driver has, whether this process may use them or not
  int rdma_adapters = 0;                     // InfiniBand or RoCE
};

// `root` is where the files of the kernel lie: "/", or a planted folder with proc, sys and dev. What is not there or
// has another form stays as above.
HostFacts read_host(const std::filesystem::path& root = "/");

}  // namespace upmoe
