#pragma once
// What a precision costs on the processor at hand.

#include <string>

namespace upmoe::ops {

// Why bf16 takes longer than fp32 on this CPU, in words for the start of a run; empty where it does not.
// Every product of bf16 works on every CPU: without an instruction for it, on widened operands.
std::string why_bf16_is_slow();

}  // namespace upmoe::ops
