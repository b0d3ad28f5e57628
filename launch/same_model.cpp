#include "launch/same_model.h"

#include <fmt/format.h>

namespace upmoe {

void require_same_model(Communicator& world, const std::string& given, const ModelSource& source) {
  // A run directory goes on while it trains: each rank may have met another of its checkpoints.
  require_equal(world, fmt::format("checkpoints of {}", given), source.directory().string());
  if (world.size() == 1) return;
  // Each host may have a folder of its own of that name, with another model in it.
  std::string digest;
  run_agreed(world, [&] { digest = digest_of(source); });
  require_equal(world, fmt::format("models in {}", given), digest);
}

}  // namespace upmoe
