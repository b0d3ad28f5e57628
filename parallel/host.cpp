#include "parallel/host.h"

#include <unistd.h>

#include <fstream>
#include <string>

#include "kernels/core/philox.h"

namespace upmoe {

namespace {

std::int64_t host_number() {
  char name[256] = "host";
  gethostname(name, sizeof name - 1);
  std::string words = name;
  std::ifstream boot("/proc/sys/kernel/random/boot_id");  // two hosts may have one name
  std::string id;
  if (boot >> id) words += id;
  return static_cast<std::int64_t>(philox_key(1, words));
}

}  // namespace

std::vector<std::int64_t> gather(Communicator& world, std::int64_t mine) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(world.size()));
  world.all_gather(host_view(all.data(), {world.size()}), host_view(&mine, {1})).wait();
  return all;
}

std::vector<std::int64_t> hosts_of(Communicator& world) {
  return gather(world, host_number());
}

}  // namespace upmoe
