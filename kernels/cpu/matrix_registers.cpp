#include "kernels/cpu/matrix_registers.h"

#include <cstdlib>

#include "kernels/cpu/dense_product.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef UPMOE_MATRIX_REGISTERS
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace upmoe::cpu {

#ifdef UPMOE_MATRIX_REGISTERS

namespace {

// Linux saves the registers of processes that asked for them. It may refuse: a kernel before 5.16, a sandbox, a thread
// whose stack for signals has no room for them.
bool asked_for() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_matrix_registers() {
  static const bool has = onednn_has_matrix_registers() && asked_for();
  return has;
}

#else

bool has_matrix_registers() {
  return false;
}

#endif

namespace {

bool processor_has_them() {
#ifdef __x86_64__
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBf16) != 0 && (edx & kTile) != 0;
#else
  return false;
#endif
}

}  // namespace

std::string why_matrix_registers_are_not_used() {
  if (has_matrix_registers() || !processor_has_them()) return {};
#ifdef UPMOE_MATRIX_REGISTERS
  if (!asked_for()) return "Linux does not give this process its matrix registers (AMX)";
  if (std::getenv("ONEDNN_MAX_CPU_ISA") != nullptr)
    return "ONEDNN_MAX_CPU_ISA hides its matrix registers (AMX)";
  return "oneDNN does not know its matrix registers (AMX)";
#else
  return "this program was compiled without its matrix registers (AMX)";
#endif
}

}  // namespace upmoe::cpu
