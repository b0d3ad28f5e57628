#include "launch/same_model.h"

#include <fmt/format.h>

namespace upmoe {

void require_same_model(Communicator& world, const std::string& given, const ModelSource& source) {
  // A run directory goes on while it trains: each rank may have met another of its checkpoints. Or its host has a copy.
  require_equal(world, fmt::format("copies of {}", given),
                source.directory().string() + "\n" + function_without_routers(source.config()));
  if (world.size() == 1) return;
  std::string digest;
  run_agreed(world, [&] { digest = digest_of(source); });
  require_equal(world, fmt::format("models in {}", given), digest);
}

}  // namespace upmoe
