#pragma once
// The processor's matrix registers (kernels/cpu/matrix_registers.h) as plain loops, for processors without them. Of
// each thread its own, as there; whoever uses them without having asked for them (Use) ends the program, as there.

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels/core/bf16.h"
#include "kernels/cpu/matrix_registers.h"

namespace upmoe::test {

struct PlainMatrices {
  struct Use {
    Use() {
      in_use() = true;
      for (auto& one : registers().of) std::memset(one, 0, sizeof one);
    }
    ~Use() { in_use() = false; }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
  };

  template <int kRegister>
  static void zero() {
    std::memset(mine<kRegister>(), 0, kBytes);
  }
  template <int kRegister>
  static void load(const void* rows, std::int64_t stride) {
    for (std::int64_t i = 0; i < cpu::kMatrixRows; ++i)
      std::memcpy(mine<kRegister>()[i], static_cast<const char*>(rows) + i * stride, kRowBytes);
  }
  template <int kRegister>
  static void store(void* rows, std::int64_t stride) {
    for (std::int64_t i = 0; i < cpu::kMatrixRows; ++i)
      std::memcpy(static_cast<char*>(rows) + i * stride, mine<kRegister>()[i], kRowBytes);
  }
  // As Intel's manual has TDPBF16PS: sums of even and of odd depth apart, each a chain of fused products, then both to
  // the sum that is there.
  template <int kSum, int kA, int kB>
  static void multiply_add() {
    const auto *a = mine<kA>(), *b = mine<kB>();
    auto* sum = mine<kSum>();
    for (std::int64_t m = 0; m < cpu::kMatrixRows; ++m)
      for (std::int64_t n = 0; n < cpu::kMatrixRows; ++n) {
        float even = 0, odd = 0;
        for (std::int64_t k = 0; k < cpu::kMatrixRows; ++k) {
          even = flushed(std::fma(half(a[m][k], 0), half(b[k][n], 0), even));
          odd = flushed(std::fma(half(a[m][k], 1), half(b[k][n], 1), odd));
        }
        const float before = flushed(std::bit_cast<float>(sum[m][n]));
        sum[m][n] = std::bit_cast<std::uint32_t>(flushed(before + flushed(even + odd)));
      }
  }

 private:
  static constexpr std::size_t kRowBytes = 64, kBytes = 1024;
  struct Registers {
    std::uint32_t of[8][cpu::kMatrixRows][cpu::kMatrixRows];
  };
  static Registers& registers() {
    thread_local Registers all;
    return all;
  }
  static bool& in_use() {
    thread_local bool is = false;
    return is;
  }
  template <int kRegister>
  static std::uint32_t (*mine())[cpu::kMatrixRows] {
    if (!in_use()) std::abort();
    return registers().of[kRegister];
  }
  static float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
  static float half(std::uint32_t pair, int which) {
    return flushed(std::bit_cast<float>(which == 0 ? pair << 16 : pair & 0xffff0000u));
  }
};

}  // namespace upmoe::test
