#include "kernels/cpu/matrix_registers.h"

#include "kernels/cpu/dense_product.h"

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

}  // namespace upmoe::cpu
