#include "trainer/diagnosis/host_facts.h"

#include <sys/statvfs.h>

#include <cstdlib>
#include <sstream>

#include "parallel/host.h"
#include "parallel/threads.h"
#include "trainer/memory_estimate.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

// What stands behind `key` and a colon, blanks left out.
std::string value_of(const std::string& text, const std::string& key) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || line.compare(0, key.size(), key) != 0) continue;
    const std::size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

// "Max open files            1024                 1048576              files"
ResourceLimit limit_of(const std::string& limits, const std::string& name) {
  const auto number = [](const std::string& word) {
    return word == "unlimited" ? kUnlimited
                               : static_cast<std::uint64_t>(std::strtoull(word.c_str(), nullptr, 10));
  };
  std::istringstream lines(limits);
  for (std::string line; std::getline(lines, line);) {
    if (line.compare(0, name.size(), name) != 0) continue;
    std::istringstream words(line.substr(name.size()));
    std::string soft, hard;
    if (words >> soft >> hard) return {number(soft), number(hard)};
  }
  return {};
}

int entries_in(const fs::path& folder) {
  std::error_code error;
  int entries = 0;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) ++entries;
  return entries;
}

std::optional<double> room_of(const fs::path& folder) {
  struct statvfs room {};
  if (statvfs(folder.c_str(), &room) != 0) return std::nullopt;
  return static_cast<double>(room.f_bavail) * static_cast<double>(room.f_frsize);
}

// "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Sat Nov ..."; open modules have other words before it.
std::string driver_version(const std::string& text) {
  std::istringstream words(text.substr(0, text.find('\n')));
  for (std::string word; words >> word;)
    if (word.find_first_not_of("0123456789.") == std::string::npos && word.find('.') != std::string::npos)
      return word;
  return "";
}

}  // namespace

HostFacts read_host(const fs::path& root) {
  const fs::path proc = root / "proc";
  const std::string own_group = system_text(proc / "self/cgroup"), memory = system_text(proc / "meminfo"),
                    limits = system_text(proc / "self/limits"), status = system_text(proc / "self/status");
  const std::string groups = (root / "sys/fs/cgroup").string();
  HostFacts facts;
  facts.processor = value_of(system_text(proc / "cpuinfo"), "model name");
  facts.allowed = value_of(status, "Cpus_allowed_list");
  facts.resident = 1024.0 * std::atof(value_of(status, "VmRSS").c_str());
  facts.quota = quota_of_container(groups, own_group);
  facts.memory = 1024.0 * std::atof(value_of(memory, "MemTotal").c_str());
  facts.memory_left = memory_left(groups, own_group, memory);
  facts.open_files = limit_of(limits, "Max open files");
  facts.locked_memory = limit_of(limits, "Max locked memory");
  facts.shared_memory_left = room_of(root / "dev/shm");
  facts.gpu_driver = driver_version(system_text(proc / "driver/nvidia/version"));
  facts.gpus = entries_in(proc / "driver/nvidia/gpus");
  facts.rdma_adapters = entries_in(root / "sys/class/infiniband");
  return facts;
}

}  // namespace upmoe
