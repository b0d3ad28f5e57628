#pragma once
// What the fuzzers call with arbitrary bytes. Accepting or refusing with Error(kBadInput or kUsage) is fine;
// anything else (another exception, a crash, a sanitizer's complaint) ends the process.

#include <cstddef>
#include <cstdint>

namespace upmoe::fuzz {

void safetensors(const std::uint8_t* data, std::size_t size);
void configurations(const std::uint8_t* data, std::size_t size);  // run, upcycling and model configuration

}  // namespace upmoe::fuzz
