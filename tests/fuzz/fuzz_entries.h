#pragma once
// What the fuzzers call with arbitrary bytes. Accepting or refusing with Error(kBadInput or kUsage) is fine;
// anything else (another exception, a crash, a sanitizer's complaint) ends the process. Each says whether it
// accepted.

#include <cstddef>
#include <cstdint>

namespace upmoe::fuzz {

bool safetensors(const std::uint8_t* data, std::size_t size);
bool configurations(const std::uint8_t* data, std::size_t size);  // run, upcycling and model configuration
bool token_file(const std::uint8_t* data, std::size_t size);
// As it is, and once more with the checksum that its content asks for.
bool manifest(const std::uint8_t* data, std::size_t size);
bool shard_table(const std::uint8_t* data,
                 std::size_t size);                      // what ranks tell each other about their shards
bool index(const std::uint8_t* data, std::size_t size);  // model.safetensors.index.json

}  // namespace upmoe::fuzz
