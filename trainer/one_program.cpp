#include "trainer/one_program.h"

#include <string>

#include "data/posix_file.h"

namespace upmoe {

std::string require_one_program(Communicator& world) {
  std::string digest;
  run_agreed(world, [&] { digest = fmt::format("{:08x}", crc32c_of_file("/proc/self/exe")); });
  require_equal(world, "programs", digest);
  return digest;
}

}  // namespace upmoe
