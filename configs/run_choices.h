#pragma once
// What a run configuration chooses between, with the words its file has for it.

#include <cstdint>

#include "configs/names.h"
#include "kernels/core/kernel_paths.h"
#include "kernels/core/tensor.h"

namespace upmoe {

enum class ModelInit : std::uint8_t { kWeights, kRandom };
template <>
inline constexpr Names<ModelInit> kNames<ModelInit>{
    .built = {{ModelInit::kWeights, "weights"}, {ModelInit::kRandom, "random"}}};

// trainer/model/balance.h has their formulas
enum class AuxKind : std::uint8_t { kHf, kSwitch, kGShard, kSequence, kGroup, kGlobal, kImportance, kLoad };
template <>
inline constexpr Names<AuxKind> kNames<AuxKind>{.built = {{AuxKind::kHf, "hf"},
                                                          {AuxKind::kSwitch, "switch"},
                                                          {AuxKind::kGShard, "gshard"},
                                                          {AuxKind::kSequence, "sequence"},
                                                          {AuxKind::kGroup, "group"},
                                                          {AuxKind::kGlobal, "global"},
                                                          {AuxKind::kImportance, "importance"},
                                                          {AuxKind::kLoad, "load"}}};

enum class Precision : std::uint8_t { kFp32, kBf16 };
template <>
inline constexpr Names<Precision> kNames<Precision>{
    .built = {{Precision::kFp32, "fp32"}, {Precision::kBf16, "bf16"}}};
constexpr DType dtype_of(Precision precision) {
  return precision == Precision::kBf16 ? DType::kBF16 : DType::kF32;
}

// Of the routers' weights, their gradients and their product.
enum class RouterDType : std::uint8_t { kAuto, kFp32 };  // kAuto: as the other weights
template <>
inline constexpr Names<RouterDType> kNames<RouterDType>{
    .built = {{RouterDType::kAuto, "auto"}, {RouterDType::kFp32, "fp32"}}};

// What backward makes again instead of keeping it. By itself: kNorms, the outputs of a block's two norms. From kSwiglu
// on each with what stands before it, without the norms: kSwiglu, what lies between the two products of a feed-forward
// network (an elementwise op) and the rows that experts are given (copies, where one rank has all experts); kRoutedUp,
// the experts' first product; kUp, that of dense networks and of the shared expert; kFfn, the feed-forward half;
// kBlock, everything but the block's input. kElementwise: kNorms and kSwiglu, all that takes no product.
enum class Recompute : std::uint8_t { kNone, kNorms, kSwiglu, kElementwise, kRoutedUp, kUp, kFfn, kBlock };
template <>
inline constexpr Names<Recompute> kNames<Recompute>{.built = {{Recompute::kNone, "none"},
                                                              {Recompute::kNorms, "norms"},
                                                              {Recompute::kSwiglu, "swiglu"},
                                                              {Recompute::kElementwise, "elementwise"},
                                                              {Recompute::kRoutedUp, "routed_up"},
                                                              {Recompute::kUp, "up"},
                                                              {Recompute::kFfn, "ffn"},
                                                              {Recompute::kBlock, "block"}}};

template <>
inline constexpr Names<ExpertsPath> kNames<ExpertsPath>{.built = {{ExpertsPath::kAuto, "auto"},
                                                                  {ExpertsPath::kStreams, "streams"},
                                                                  {ExpertsPath::kFused, "fused"}}};

template <>
inline constexpr Names<CrossEntropyPath> kNames<CrossEntropyPath>{
    .built = {{CrossEntropyPath::kAuto, "auto"},
              {CrossEntropyPath::kPortable, "portable"},
              {CrossEntropyPath::kClusters, "clusters"}}};

enum class OptimizerKind : std::uint8_t { kAdamW, kAdamW8bit };
template <>
inline constexpr Names<OptimizerKind> kNames<OptimizerKind>{
    .built = {{OptimizerKind::kAdamW, "adamw"}, {OptimizerKind::kAdamW8bit, "adamw8bit"}}};

enum class ScheduleKind : std::uint8_t { kCosine, kWsd, kConstant };
template <>
inline constexpr Names<ScheduleKind> kNames<ScheduleKind>{.built = {{ScheduleKind::kCosine, "cosine"},
                                                                    {ScheduleKind::kWsd, "wsd"},
                                                                    {ScheduleKind::kConstant, "constant"}}};

enum class DeviceChoice : std::uint8_t { kAuto, kCpu, kCuda };  // kAuto: GPUs where every rank has one
template <>
inline constexpr Names<DeviceChoice> kNames<DeviceChoice>{
    .built = {{DeviceChoice::kAuto, "auto"}, {DeviceChoice::kCpu, "cpu"}, {DeviceChoice::kCuda, "cuda"}}};

}  // namespace upmoe
