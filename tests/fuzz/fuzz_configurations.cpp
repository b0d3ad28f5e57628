#include <cstdio>
#include <cstdlib>
#include <string>

#include "configs/model_config.h"
#include "configs/run_config.h"
#include "configs/upcycle_config.h"
#include "kernels/core/check.h"
#include "tests/fuzz/fuzz_entries.h"

namespace upmoe::fuzz {

namespace {

template <class Parse>
bool may_refuse(const Parse& parse) {
  try {
    parse();
    return true;
  } catch (const Error& e) {
    if (e.code() == ExitCode::kUsage || e.code() == ExitCode::kBadInput) return false;
    std::fprintf(stderr, "fuzz: refused with status %d: %s\n", static_cast<int>(e.code()), e.what());
    std::abort();
  }
}

}  // namespace

bool configurations(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  int accepted = may_refuse([&] { parse_run_config(text, "fuzz", {}); }) ? 1 : 0;
  accepted += may_refuse([&] { parse_run_config("", "fuzz", {text}); }) ? 1 : 0;  // section.key=value
  accepted += may_refuse([&] { parse_upcycle_config(text, "fuzz", {}); }) ? 1 : 0;
  accepted += may_refuse([&] { parse_model_config(text, "fuzz"); }) ? 1 : 0;
  return accepted > 0;
}

}  // namespace upmoe::fuzz
