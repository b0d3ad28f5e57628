#pragma once
// What the fuzzers call with arbitrary bytes. Accepting or refusing with Error(kBadInput or kUsage) is fine; anything
// else (another exception, a crash, a sanitizer's complaint) ends the process. Each says whether it accepted.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "kernels/core/check.h"

namespace upmoe::fuzz {

bool safetensors(const std::uint8_t* data, std::size_t size);
// A run's, a recipe's and a model's configuration.
bool configurations(const std::uint8_t* data, std::size_t size);
bool token_file(const std::uint8_t* data, std::size_t size);
// The index of tests/data/from_megatron.bin.
bool megatron_index(const std::uint8_t* data, std::size_t size);
// As it is, and once more with the checksum that its content asks for.
bool manifest(const std::uint8_t* data, std::size_t size);
// What ranks tell each other about their shards.
bool shard_table(const std::uint8_t* data, std::size_t size);
// model.safetensors.index.json
bool index(const std::uint8_t* data, std::size_t size);

// Of the entries: whether `read` takes its input.
template <class Read>
bool accepts(const Read& read) {
  try {
    read();
    return true;
  } catch (const Error& e) {
    if (e.code() == ExitCode::kUsage || e.code() == ExitCode::kBadInput) return false;
    std::fprintf(stderr, "fuzz: refused with status %d: %s\n", static_cast<int>(e.code()), e.what());
    std::abort();
  }
}

}  // namespace upmoe::fuzz
