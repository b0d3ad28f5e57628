#include "trainer/shared_folder.h"

#include <fmt/format.h>
#include <unistd.h>

#include <ctime>

#include "data/folder.h"
#include "data/posix_file.h"
#include "parallel/host.h"
#include "parallel/texts.h"

namespace upmoe {

namespace fs = std::filesystem;

// The name is new, so that no host can have an answer to it from before.
bool sees_files_of_rank_0(Communicator& world, const fs::path& folder) {
  const bool first = world.rank() == 0;
  const std::string name = broadcast_text(
      world,
      first ? fmt::format(".upmoe-shared-{}-{:x}", static_cast<long>(getpid()), std::time(nullptr)) : "", 0);
  bool made = false;
  if (first) {
    try {
      write_text_synced(folder / name, "of rank 0\n");
      made = true;
    } catch (const Error&) {  // the caller's work meets it too
    }
  }
  if (gather(world, made ? 1 : 0).front() == 0) return true;
  bool seen = true;
  run_agreed(world, [&] { seen = path_exists(folder / name); });
  run_agreed(world, [&] {
    if (first) remove_file(folder / name);
  });
  return seen;
}

std::string words_of_unshared(const fs::path& folder) {
  return fmt::format(
      "{} on {} is not the folder of that name on rank 0's host: run.dir must lie on a file system "
      "that all hosts share",
      folder.string(), host_name());
}

void require_shared(Communicator& world, const fs::path& folder) {
  if (place_among(hosts_of(world), world.rank()).hosts == 1) return;
  const bool seen = sees_files_of_rank_0(world, folder);
  agree(world, ExitCode::kBadInput, seen ? "" : words_of_unshared(folder));
}

}  // namespace upmoe
