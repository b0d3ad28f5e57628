#include <cstdio>
#include <cstdlib>
#include <span>

#include "data/safetensors.h"
#include "tests/fuzz/fuzz_entries.h"

namespace upmoe::fuzz {

namespace {
void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}
}  // namespace

bool safetensors(const std::uint8_t* data, std::size_t size) {
  try {
    const SafetensorsHeader header =
        parse_safetensors_header(std::as_bytes(std::span(data, size)), size, "fuzz");
    std::uint64_t at = 0;  // what was accepted lies inside the file, piece behind piece
    for (const SafetensorsEntry& e : header.entries) {
      require(e.begin == at && e.end >= e.begin, "a gap or an overlap was accepted");
      at = e.end;
    }
    require(header.data_begin <= size && at == size - header.data_begin,
            "tensors outside the file were accepted");
    return true;
  } catch (const Error& e) {
    require(e.code() == ExitCode::kBadInput, e.what());
    return false;
  }
}

}  // namespace upmoe::fuzz
