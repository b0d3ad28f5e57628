// What the flags of this build allow the compiler to use, as it says itself: a constant and no code, so that
// it can be read on any processor.

#include "kernels/core/processor.h"

namespace upmoe {

namespace {

consteval ProcessorFeatures bit(ProcessorFeature feature) {
  return ProcessorFeatures{1} << static_cast<unsigned>(feature);
}

}  // namespace

extern constinit const ProcessorFeatures kCompiledFeatures = ProcessorFeatures{0}
#ifdef __SSE3__
                                                             | bit(ProcessorFeature::kSse3)
#endif
#ifdef __SSSE3__
                                                             | bit(ProcessorFeature::kSsse3)
#endif
#ifdef __SSE4_1__
                                                             | bit(ProcessorFeature::kSse4_1)
#endif
#ifdef __SSE4_2__
                                                             | bit(ProcessorFeature::kSse4_2)
#endif
#ifdef __POPCNT__
                                                             | bit(ProcessorFeature::kPopcnt)
#endif
#ifdef __AVX__
                                                             | bit(ProcessorFeature::kAvx)
#endif
#ifdef __F16C__
                                                             | bit(ProcessorFeature::kF16c)
#endif
#ifdef __FMA__
                                                             | bit(ProcessorFeature::kFma)
#endif
#ifdef __AVX2__
                                                             | bit(ProcessorFeature::kAvx2)
#endif
#ifdef __BMI__
                                                             | bit(ProcessorFeature::kBmi)
#endif
#ifdef __BMI2__
                                                             | bit(ProcessorFeature::kBmi2)
#endif
#ifdef __LZCNT__
                                                             | bit(ProcessorFeature::kLzcnt)
#endif
#ifdef __MOVBE__
                                                             | bit(ProcessorFeature::kMovbe)
#endif
#ifdef __FMA4__
                                                             | bit(ProcessorFeature::kFma4)
#endif
#ifdef __XOP__
                                                             | bit(ProcessorFeature::kXop)
#endif
#ifdef __TBM__
                                                             | bit(ProcessorFeature::kTbm)
#endif
#ifdef __AVX512F__
                                                             | bit(ProcessorFeature::kAvx512f)
#endif
#ifdef __AVX512CD__
                                                             | bit(ProcessorFeature::kAvx512cd)
#endif
#ifdef __AVX512BW__
                                                             | bit(ProcessorFeature::kAvx512bw)
#endif
#ifdef __AVX512DQ__
                                                             | bit(ProcessorFeature::kAvx512dq)
#endif
#ifdef __AVX512VL__
                                                             | bit(ProcessorFeature::kAvx512vl)
#endif
#ifdef __AVX512IFMA__
                                                             | bit(ProcessorFeature::kAvx512ifma)
#endif
#ifdef __AVX512VBMI__
                                                             | bit(ProcessorFeature::kAvx512vbmi)
#endif
#ifdef __AVX512VBMI2__
                                                             | bit(ProcessorFeature::kAvx512vbmi2)
#endif
#ifdef __AVX512VNNI__
                                                             | bit(ProcessorFeature::kAvx512vnni)
#endif
#ifdef __AVX512BITALG__
                                                             | bit(ProcessorFeature::kAvx512bitalg)
#endif
#ifdef __AVX512VPOPCNTDQ__
                                                             | bit(ProcessorFeature::kAvx512vpopcntdq)
#endif
#ifdef __AVX512BF16__
                                                             | bit(ProcessorFeature::kAvx512bf16)
#endif
#ifdef __AVX512FP16__
                                                             | bit(ProcessorFeature::kAvx512fp16)
#endif
#ifdef __AVXVNNI__
                                                             | bit(ProcessorFeature::kAvxVnni)
#endif
#ifdef __GFNI__
                                                             | bit(ProcessorFeature::kGfni)
#endif
#ifdef __APX_F__
                                                             | bit(ProcessorFeature::kApx)
#endif
    ;

}  // namespace upmoe
