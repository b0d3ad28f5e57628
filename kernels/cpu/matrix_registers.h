#pragma once
// The processor's matrix registers (Intel's AMX), one function an instruction: eight of 16 rows by 64 bytes. What
// computes with them takes the type that has these functions as a parameter, so that a test can put plain loops in its
// place (tests/support/plain_matrices.h) and try all of it on processors that have none.
//
//   A: 16 rows, 16 pairs of depth each       B: 16 pairs of depth, 16 columns each       sum: 16 x 16 of fp32
//      a00 a01 | a02 a03 | ...                  b00 b10 | b01 b11 | ... column 1
//      a10 a11 | a12 a13 | ...                  b20 b30 | b21 b31 | ...
//
// A sum has the products of one pair of registers added to each other first, those of even and those of odd depth apart
// and in order, and their sum to what is there. Numbers below 2^-126 count as zero.

#include <cstdint>
#include <string>
#include <type_traits>

namespace upmoe::cpu {

// Rows of a register, and its columns of fp32 numbers or of pairs of bf16.
constexpr std::int64_t kMatrixRows = 16;
constexpr std::int64_t kMatrixUnits = kMatrixRows * kMatrixRows;

// Whether this build's instructions for matrix registers can be used: the processor has them, the operating system lets
// this process have them (asked for once), and ONEDNN_MAX_CPU_ISA does not hide them.
bool has_matrix_registers();

// Of a processor that has them while has_matrix_registers() does not: why, in words; else empty.
std::string why_matrix_registers_are_not_used();

// A build for processors with pairs of bf16 can ask for them; the assembler knows their instructions everywhere.
#if defined(__AVX512BF16__) && defined(__linux__)
#define UPMOE_MATRIX_REGISTERS 1

struct MatrixRegisters {
  // The calling thread has the registers as 16 rows of 64 bytes while it lives. Without it, a change of threads need
  // not save them.
  struct Use {
    Use() {
      struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shape;
      asm volatile("ldtilecfg\t%0" ::"m"(shape));
    }
    ~Use() { asm volatile("tilerelease"); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
  };

  template <int kRegister>
  [[gnu::always_inline]] static void zero() {
    asm volatile("tilezero\t%%tmm%c0" ::"i"(kRegister));
  }
  // Rows stand `stride` bytes apart.
  template <int kRegister>
  [[gnu::always_inline]] static void load(const void* rows, std::int64_t stride) {
    asm volatile("tileloadd\t(%1,%2,1), %%tmm%c0" ::"i"(kRegister), "r"(rows), "r"(stride) : "memory");
  }
  template <int kRegister>
  [[gnu::always_inline]] static void store(void* rows, std::int64_t stride) {
    asm volatile("tilestored\t%%tmm%c0, (%1,%2,1)" ::"i"(kRegister), "r"(rows), "r"(stride) : "memory");
  }
  template <int kSum, int kA, int kB>
  [[gnu::always_inline]] static void multiply_add() {
    asm volatile("tdpbf16ps\t%%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};
#endif

}  // namespace upmoe::cpu
