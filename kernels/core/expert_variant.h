#pragma once
// Variants of the fused kernels of routed experts (kernels/cuda/sm90): the same sums in the same order, so the same
// bits, brought to the tensor cores in other ways. Which is the fastest only a GPU says: tests/bench/time_variants.

#include <array>
#include <compare>
#include <cstdint>
#include <span>
#include <string>

namespace upmoe {

enum class ExpertKernel : std::uint8_t {
  kUp,        // gathered rows, gates and ups, SwiGLU
  kDown,      // its rows through the second weight
  kDx,        // gradients of gates and ups through the first weight
  kDHidden,   // gradient of the hidden rows, SwiGLU's backward
  kDwGateUp,  // gradients of the weights
  kDwDown,
};
constexpr int kExpertKernels = 6;

// Which of an expert's tiles come one after the other: those of other rows, for which the weights stay in the cache, or
// of other columns, for which the rows do.
enum class TileOrder : std::uint8_t { kRows, kColumns };

struct ExpertVariant {
  int blocks = 2;  // of a cluster: two share what they load
  int stages = 4;  // operands on their way
  TileOrder order = TileOrder::kRows;
  // How many stages behind its copies a thread says that its gathered rows are there, and shows them to the tensor
  // cores; 0: the hardware says so by itself, and who multiplies shows them.
  int lag = 0;
  auto operator<=>(const ExpertVariant&) const = default;
};

// Those that are compiled. The first is taken where no table names another; each further one differs from it in one
// thing. A cluster's second block takes other columns of the weights' gradients, which a width must have.
inline constexpr ExpertVariant kUpVariants[] = {{2, 4},
                                                {1, 4},
                                                {2, 3},
                                                {2, 4, TileOrder::kColumns},
                                                {2, 4, TileOrder::kRows, 1},
                                                {2, 4, TileOrder::kRows, 2}};
inline constexpr ExpertVariant kRowsVariants[] = {{2, 4}, {1, 4}, {2, 3}, {2, 4, TileOrder::kColumns}};
// Single blocks of this one spill, so that there are none.
inline constexpr ExpertVariant kDHiddenVariants[] = {
    {2, 5}, {2, 4}, {2, 5, TileOrder::kColumns}, {2, 5, TileOrder::kRows, 1}, {2, 5, TileOrder::kRows, 2}};
inline constexpr ExpertVariant kDWeightsVariants[] = {
    {2, 4}, {1, 4}, {2, 3}, {2, 4, TileOrder::kColumns}, {2, 4, TileOrder::kRows, 2}};

constexpr std::span<const ExpertVariant> variants_of(ExpertKernel kernel) {
  switch (kernel) {
    case ExpertKernel::kUp:
      return kUpVariants;
    case ExpertKernel::kDown:
    case ExpertKernel::kDx:
      return kRowsVariants;
    case ExpertKernel::kDHidden:
      return kDHiddenVariants;
    case ExpertKernel::kDwGateUp:
    case ExpertKernel::kDwDown:
      return kDWeightsVariants;
  }
  return {};
}

constexpr const char* name_of(ExpertKernel kernel) {
  constexpr const char* kNames[kExpertKernels] = {"up", "down", "dx", "dhidden", "dw_gate_up", "dw_down"};
  return kNames[static_cast<std::size_t>(kernel)];
}
constexpr const char* name_of(TileOrder order) {
  return order == TileOrder::kRows ? "rows" : "columns";
}

inline std::string words_of(const ExpertVariant& v) {
  return "clusters of " + std::to_string(v.blocks) + ", " + std::to_string(v.stages) + " stages, " +
         name_of(v.order) + " first, lag " + std::to_string(v.lag);
}

}  // namespace upmoe
