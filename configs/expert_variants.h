#pragma once
// The table of kernels/core/expert_variants.h as text: cuda/expert_variants.yaml, which is compiled into the program.

#include <string>
#include <string_view>

#include "kernels/core/expert_variants.h"

namespace upmoe {

// Throws Error(kUsage) that lists everything wrong, with its line; so is a variant that this program does not have.
ExpertVariants parse_expert_variants(std::string_view yaml, const std::string& where);
std::string to_yaml(const ExpertVariants& variants);  // with the comment of the committed file

std::string_view expert_variants_text();  // as committed when this program was built
// What it says; read at the first call.
const ExpertVariants& committed_expert_variants();

}  // namespace upmoe
