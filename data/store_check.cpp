#include "data/store_check.h"

#include "data/manifest.h"

namespace upmoe {

void require_checksum(const std::filesystem::path& file, std::uint32_t found, std::uint32_t expected) {
  if (found != expected)
    fail(ExitCode::kBadInput, "{}: damaged: checksum {:08x}, expected {:08x}; use an older checkpoint",
         file.string(), found, expected);
}

StoreCheck::StoreCheck(const ShardStore& store, int part, int parts)
    : store_(store), next_(static_cast<std::size_t>(part)), stride_(static_cast<std::size_t>(parts)) {}

bool StoreCheck::advance(std::chrono::milliseconds at_most) {
  const auto end = std::chrono::steady_clock::now() + at_most;
  const auto& files = store_.manifest().files;
  do {
    if (next_ >= files.size()) return false;
    const StoredFile& file = files[next_];
    if (!reading_) reading_.emplace(store_.dir() / file.name);
    if (!reading_->advance()) {
      require_checksum(store_.dir() / file.name, reading_->value(), file.crc);
      reading_.reset();
      next_ += stride_;
    }
  } while (std::chrono::steady_clock::now() < end);
  return true;
}

}  // namespace upmoe
