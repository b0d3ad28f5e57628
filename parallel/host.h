#pragma once
// The host that this process runs on, and which ranks share one.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "parallel/communicator.h"

namespace upmoe {

// Its name, cut at 255 characters; "?" where it has none.
std::string host_name();
// What a file of /proc or /sys says now; empty where there is none.
std::string system_text(const std::filesystem::path& file);

// Of every rank a number that the processes of one host share, and no others. Collective.
std::vector<std::int64_t> hosts_of(Communicator& world);
// Where a rank is among those of its job.
struct HostPlace {
  int ranks_here = 1;  // on its host, itself with them
  int hosts = 1;       // of the job
  bool speaks = true;  // the lowest rank of its host, which says once what all of them would
};
HostPlace place_among(const std::vector<std::int64_t>& hosts, int rank);  // `hosts`: of hosts_of()

// One number of each rank, by rank. Collective.
std::vector<std::int64_t> gather(Communicator& world, std::int64_t mine);

}  // namespace upmoe
