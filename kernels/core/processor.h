#pragma once
// Whether the processor has what the program was compiled for. Every program that links kernels_core asks
// before its first static initialiser runs, and one that would meet an illegal instruction ends there with
// status 71 and says how to build it anew.
//
// processor.cpp alone is compiled for any x86-64, whatever the build is for. So nothing here is inline: of an
// inline function the linker may keep the copy of another file, compiled for more.

#include <cstddef>
#include <cstdint>

namespace upmoe {

// Instruction sets that a compiler uses unasked when it is allowed to.
enum class ProcessorFeature : std::uint8_t {
  kSse3,
  kSsse3,
  kSse4_1,
  kSse4_2,
  kPopcnt,
  kAvx,
  kF16c,
  kFma,
  kAvx2,
  kBmi,
  kBmi2,
  kLzcnt,
  kMovbe,  // so far x86-64-v3
  kFma4,
  kXop,
  kTbm,
  kAvx512f,
  kAvx512cd,
  kAvx512bw,
  kAvx512dq,
  kAvx512vl,
  kAvx512ifma,
  kAvx512vbmi,
  kAvx512vbmi2,
  kAvx512vnni,
  kAvx512bitalg,
  kAvx512vpopcntdq,
  kAvx512bf16,
  kAvx512fp16,
  kAvxVnni,
  kGfni,
  kApx,
  kCount
};

using ProcessorFeatures = std::uint64_t;  // bit i: the feature i

// What the compiler was allowed to use: a constant, of compiled_features.cpp.
extern const ProcessorFeatures kCompiledFeatures;

// What this processor and its operating system offer.
ProcessorFeatures processor_features();

ProcessorFeatures missing_features(ProcessorFeatures compiled, ProcessorFeatures have);

// The features' names as the compiler's options have them, separated by blanks; cut off where `size` ends.
void write_feature_names(ProcessorFeatures features, char* out, std::size_t size);

// Runs by itself as the program starts. Nobody calls it, so the linker is told its name
// (kernels/CMakeLists.txt).
extern "C" [[gnu::constructor(101)]] void upmoe_check_processor();

}  // namespace upmoe
