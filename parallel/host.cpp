#include "parallel/host.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>

#include "kernels/core/philox.h"

namespace upmoe {

std::string host_name() {
  char name[256] = {};
  return gethostname(name, sizeof name - 1) == 0 && name[0] != 0 ? name : "?";
}

std::string system_text(const std::filesystem::path& file) {
  std::ifstream in(file);
  return {std::istreambuf_iterator<char>(in), {}};
}

namespace {

std::int64_t host_number() {
  // Two hosts may have one name.
  return static_cast<std::int64_t>(
      philox_key(1, host_name() + system_text("/proc/sys/kernel/random/boot_id")));
}

}  // namespace

std::vector<std::int64_t> gather(Communicator& world, std::int64_t mine) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(world.size()));
  world.all_gather(host_view(all.data(), {world.size()}), host_view(&mine, {1})).wait();
  return all;
}

HostPlace place_among(const std::vector<std::int64_t>& hosts, int rank) {
  const std::int64_t here = hosts[static_cast<std::size_t>(rank)];
  return {.ranks_here = static_cast<int>(std::count(hosts.begin(), hosts.end(), here)),
          .hosts = static_cast<int>(std::set<std::int64_t>(hosts.begin(), hosts.end()).size()),
          .speaks = std::find(hosts.begin(), hosts.end(), here) - hosts.begin() == rank};
}

std::vector<std::int64_t> hosts_of(Communicator& world) {
  return gather(world, host_number());
}

}  // namespace upmoe
