// One libFuzzer program for each entry of fuzz_entries.h.

#include "tests/fuzz/fuzz_entries.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  upmoe::fuzz::UPMOE_FUZZ_ENTRY(data, size);
  return 0;
}
