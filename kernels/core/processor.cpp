#include "kernels/core/processor.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// No header of the C++ library with code in it: see processor.h.

namespace upmoe {

namespace {

enum Register : std::uint8_t { kEax, kEbx, kEcx, kEdx };

// What the operating system has to save for a feature's registers, as bits of XCR0. A processor may have AVX-512 and
// the system not save its registers between two processes: then using it is a fault.
enum State : std::uint32_t { kAlways = 0, kYmm = 0x6, kZmm = 0xe6, kApxState = 0x80000 };

struct Place {
  const char* name;
  unsigned leaf, subleaf;
  Register reg;
  unsigned bit;
  State state;
};

// In the order of ProcessorFeature.
constexpr Place kPlaces[] = {
    {"sse3", 1, 0, kEcx, 0, kAlways},
    {"ssse3", 1, 0, kEcx, 9, kAlways},
    {"sse4.1", 1, 0, kEcx, 19, kAlways},
    {"sse4.2", 1, 0, kEcx, 20, kAlways},
    {"popcnt", 1, 0, kEcx, 23, kAlways},
    {"avx", 1, 0, kEcx, 28, kYmm},
    {"f16c", 1, 0, kEcx, 29, kYmm},
    {"fma", 1, 0, kEcx, 12, kYmm},
    {"avx2", 7, 0, kEbx, 5, kYmm},
    {"bmi", 7, 0, kEbx, 3, kAlways},
    {"bmi2", 7, 0, kEbx, 8, kAlways},
    {"lzcnt", 0x80000001, 0, kEcx, 5, kAlways},
    {"movbe", 1, 0, kEcx, 22, kAlways},
    {"fma4", 0x80000001, 0, kEcx, 16, kYmm},
    {"xop", 0x80000001, 0, kEcx, 11, kYmm},
    {"tbm", 0x80000001, 0, kEcx, 21, kAlways},
    {"avx512f", 7, 0, kEbx, 16, kZmm},
    {"avx512cd", 7, 0, kEbx, 28, kZmm},
    {"avx512bw", 7, 0, kEbx, 30, kZmm},
    {"avx512dq", 7, 0, kEbx, 17, kZmm},
    {"avx512vl", 7, 0, kEbx, 31, kZmm},
    {"avx512ifma", 7, 0, kEbx, 21, kZmm},
    {"avx512vbmi", 7, 0, kEcx, 1, kZmm},
    {"avx512vbmi2", 7, 0, kEcx, 6, kZmm},
    {"avx512vnni", 7, 0, kEcx, 11, kZmm},
    {"avx512bitalg", 7, 0, kEcx, 12, kZmm},
    {"avx512vpopcntdq", 7, 0, kEcx, 14, kZmm},
    {"avx512bf16", 7, 1, kEax, 5, kZmm},
    {"avx512fp16", 7, 0, kEdx, 23, kZmm},
    {"avxvnni", 7, 1, kEax, 4, kYmm},
    {"gfni", 7, 0, kEcx, 8, kAlways},
    {"apxf", 7, 1, kEdx, 21, kApxState},
};
static_assert(sizeof kPlaces / sizeof kPlaces[0] == static_cast<std::size_t>(ProcessorFeature::kCount));

// What x86-64-v3 stands for: all that comes before the features of single makers.
constexpr ProcessorFeatures kX86_64_v3 =
    (ProcessorFeatures{1} << static_cast<unsigned>(ProcessorFeature::kFma4)) - 1;

#ifdef __x86_64__

// Which registers the operating system saves; none where it does not say.
std::uint64_t saved_state() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kOsXsave = 1u << 27;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & kOsXsave) == 0) return 0;
  std::uint32_t low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return std::uint64_t{high} << 32 | low;
}

bool has(const Place& place, std::uint64_t saved) {
  unsigned registers[4] = {};
  if ((saved & place.state) != place.state) return false;
  if (__get_cpuid_count(place.leaf, place.subleaf, &registers[kEax], &registers[kEbx], &registers[kEcx],
                        &registers[kEdx]) == 0)
    return false;
  return (registers[place.reg] >> place.bit & 1) != 0;
}

#else  // nothing of compiled_features.cpp is said by compilers for other families

std::uint64_t saved_state() {
  return 0;
}

bool has(const Place&, std::uint64_t) {
  return false;
}

#endif

// Whether another rank of this host says it: every rank of a host finds the same. Launchers number them.
bool another_rank_speaks() {
  static const char* const kNames[] = {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"};
  for (const char* name : kNames) {
    const char* rank = getenv(name);
    if (rank != nullptr) return strcmp(rank, "0") != 0;
  }
  return false;
}

}  // namespace

ProcessorFeatures processor_features() {
  const std::uint64_t saved = saved_state();
  ProcessorFeatures all = 0;
  for (unsigned i = 0; i < static_cast<unsigned>(ProcessorFeature::kCount); ++i)
    if (has(kPlaces[i], saved)) all |= ProcessorFeatures{1} << i;
  return all;
}

ProcessorFeatures missing_features(ProcessorFeatures compiled, ProcessorFeatures have) {
  return compiled & ~have;
}

void write_feature_names(ProcessorFeatures features, char* out, std::size_t size) {
  if (size == 0) return;
  out[0] = '\0';
  for (unsigned i = 0; i < static_cast<unsigned>(ProcessorFeature::kCount); ++i) {
    if ((features >> i & 1) == 0) continue;
    const std::size_t used = strlen(out);
    snprintf(out + used, size - used, "%s%s", used > 0 ? " " : "", kPlaces[i].name);
  }
}

extern "C" void upmoe_check_processor() {
  const ProcessorFeatures have = processor_features(), missing = missing_features(kCompiledFeatures, have);
  if (missing == 0) return;
  constexpr int kDevice = 71;  // ExitCode::kDevice
  if (another_rank_speaks()) {
    sleep(2);  // a launcher ends the whole job with the first rank; let the one that speaks be that
    _exit(kDevice);
  }
  char names[512];
  write_feature_names(missing, names, sizeof names);
  const bool runs_v3 = missing_features(kX86_64_v3, have) == 0;
  fprintf(stderr,
          "%s: error: compiled for another processor (UPMOE_ARCH=%s): this one lacks %s; build the program "
          "anew on this machine with ./launch/setup.sh%s\n",
          program_invocation_short_name, UPMOE_ARCH_NAME, names,
          runs_v3 ? ", or with --arch x86-64-v3 for machines of several kinds" : "");
  _exit(kDevice);
}

}  // namespace upmoe
