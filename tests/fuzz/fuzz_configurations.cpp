#include <string>

#include "configs/model_config.h"
#include "configs/run_config.h"
#include "configs/upcycle_config.h"
#include "tests/fuzz/fuzz_entries.h"

namespace upmoe::fuzz {

bool configurations(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  int accepted = accepts([&] { parse_run_config(text, "fuzz", {}); }) ? 1 : 0;
  accepted += accepts([&] { parse_run_config("", "fuzz", {text}); }) ? 1 : 0;  // section.key=value
  accepted += accepts([&] { parse_upcycle_config(text, "fuzz", {}); }) ? 1 : 0;
  accepted += accepts([&] { parse_model_config(text, "fuzz"); }) ? 1 : 0;
  return accepted > 0;
}

}  // namespace upmoe::fuzz
