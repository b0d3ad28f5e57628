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
void may_refuse(const Parse& parse) {
  try {
    parse();
  } catch (const Error& e) {
    if (e.code() == ExitCode::kUsage || e.code() == ExitCode::kBadInput) return;
    std::fprintf(stderr, "fuzz: refused with status %d: %s\n", static_cast<int>(e.code()), e.what());
    std::abort();
  }
}

}  // namespace

void configurations(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  may_refuse([&] { parse_run_config(text, "fuzz", {}); });
  may_refuse([&] { parse_run_config("", "fuzz", {text}); });  // as --set
  may_refuse([&] { parse_upcycle_config(text, "fuzz", {}); });
  may_refuse([&] { parse_model_config(text, "fuzz"); });
}

}  // namespace upmoe::fuzz
