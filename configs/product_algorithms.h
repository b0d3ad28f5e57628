#pragma once
// The table of kernels/core/product_algorithms.h as text: cuda/product_algorithms.yaml, which is compiled into the
// program, so that the program is whole wherever it lies.

#include <string>
#include <string_view>

#include "kernels/core/product_algorithms.h"

namespace upmoe {

// Throws Error(kUsage) that lists everything wrong, with its line.
ProductAlgorithms parse_product_algorithms(std::string_view yaml, const std::string& where);
std::string to_yaml(const ProductAlgorithms& algorithms);  // with the comment of the committed file

std::string_view product_algorithms_text();  // as committed when this program was built
// What it says; read at the first call.
const ProductAlgorithms& committed_product_algorithms();

}  // namespace upmoe
