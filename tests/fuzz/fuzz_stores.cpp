#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "data/crc.h"
#include "data/hf_model.h"
#include "data/manifest.h"
#include "data/shard_store.h"
#include "data/token_dataset.h"
#include "tests/fuzz/fuzz_entries.h"

namespace upmoe::fuzz {

namespace fs = std::filesystem;

namespace {

// A folder of this process in memory, removed at its end.
const fs::path& folder() {
  struct Folder {
    fs::path path = fs::path(fs::is_directory("/dev/shm") ? "/dev/shm" : "/tmp") /
                    ("upmoe_fuzz_" + std::to_string(::getpid()));
    Folder() { fs::create_directories(path); }
    ~Folder() {
      std::error_code ignored;
      fs::remove_all(path, ignored);
    }
  };
  static const Folder made;
  return made.path;
}

void put(const fs::path& path, const std::uint8_t* data, std::size_t size) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
}

}  // namespace

bool token_file(const std::uint8_t* data, std::size_t size) {
  const fs::path path = folder() / "tokens.h5";
  put(path, data, size);
  return accepts([&] { open_token_file(path)->verify(); });
}

bool megatron_index(const std::uint8_t* data, std::size_t size) {
  static const fs::path tokens = [] {
    fs::path made = folder() / "set.bin";
    fs::copy_file(UPMOE_SOURCE_DIR "/tests/data/from_megatron.bin", made);
    return made;
  }();
  put(folder() / "set.idx", data, size);
  return accepts([&] { open_token_file(tokens)->verify(); });
}

bool manifest(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  const bool accepted = accepts([&] { parse_manifest(text, "fuzz"); });
  nlohmann::json j = nlohmann::json::parse(text, nullptr, false);
  if (!j.is_object()) return accepted;
  j.erase("checksum");
  std::string body;
  try {
    body = j.dump();
  } catch (const nlohmann::json::exception&) {  // not UTF-8
    return accepted;
  }
  j["checksum"] = crc32c(body.data(), body.size());
  return accepts([&] { parse_manifest(j.dump(), "fuzz"); }) || accepted;
}

bool shard_table(const std::uint8_t* data, std::size_t size) {
  return accepts([&] { parse_shard(std::string(reinterpret_cast<const char*>(data), size)); });
}

// The model's configuration is good and its files are missing: an index that is accepted is refused later.
bool index(const std::uint8_t* data, std::size_t size) {
  static const fs::path dir = [] {
    const fs::path made = folder() / "model";
    fs::create_directories(made);
    fs::copy_file(UPMOE_SOURCE_DIR "/tests/golden/dense_tied_gqa/config.json", made / "config.json");
    return made;
  }();
  put(dir / "model.safetensors.index.json", data, size);
  return accepts([&] { const HfModel model(dir); });
}

}  // namespace upmoe::fuzz
