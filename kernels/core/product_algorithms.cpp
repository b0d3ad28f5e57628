#include "kernels/core/product_algorithms.h"

#include <fmt/format.h>

namespace upmoe {

int choose(const ProductAlgorithms& algorithms, const ProductLibrary& library, const ProductShape& shape) {
  const auto table = algorithms.tables.find(library);
  if (table == algorithms.tables.end()) return 0;
  const auto place = table->second.find(shape);
  return place == table->second.end() ? 0 : place->second;
}

std::string words_of(const ProductShape& s) {
  return fmt::format("{} x {} x {}, {}{}, {} to {}{}{}, aligned to {}", s.m, s.n, s.k,
                     s.transpose_a ? 't' : 'n', s.transpose_b ? 't' : 'n', name_of(s.in), name_of(s.out),
                     s.adds ? ", added" : "", s.bias ? ", with a bias" : "", s.alignment);
}

}  // namespace upmoe
