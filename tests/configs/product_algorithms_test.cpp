#include "configs/product_algorithms.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

using testing::HasSubstr;

const ProductLibrary kLibrary{"NVIDIA H200", 130100};
const ProductShape kForward{.m = 32768,
                            .n = 6144,
                            .k = 2048,
                            .transpose_b = true,
                            .in = DType::kBF16,
                            .out = DType::kBF16,
                            .bias = true},
    kGradient{.m = 2048,
              .n = 2048,
              .k = 32768,
              .transpose_a = true,
              .in = DType::kBF16,
              .adds = true,
              .alignment = 16};

ProductAlgorithms example() {
  return {
      {{kLibrary, {{kForward, 3}, {kGradient, 7}}}, {{"NVIDIA H100 80GB HBM3", 130100}, {{kForward, 1}}}}};
}

TEST(ProductAlgorithms, ChoosesByDeviceVersionAndShape) {
  const ProductAlgorithms table = example();
  EXPECT_EQ(choose(table, kLibrary, kForward), 3);
  EXPECT_EQ(choose(table, kLibrary, kGradient), 7);
  EXPECT_EQ(choose(table, {"NVIDIA H100 80GB HBM3", 130100}, kForward), 1);
  EXPECT_EQ(choose(table, {"NVIDIA H100 80GB HBM3", 130100}, kGradient), 0) << "not in its table";
  EXPECT_EQ(choose(table, {"NVIDIA H200", 130200}, kForward), 0) << "another version of the library";
  EXPECT_EQ(choose({}, kLibrary, kForward), 0);
  ProductShape other = kForward;
  other.bias = false;
  EXPECT_EQ(choose(table, kLibrary, other), 0);
  other = kForward;
  other.m -= 1;
  EXPECT_EQ(choose(table, kLibrary, other), 0);
}

TEST(ProductAlgorithms, ReadsWhatItWrites) {
  const ProductAlgorithms table = example();
  EXPECT_EQ(parse_product_algorithms(to_yaml(table), "table").tables, table.tables);
  EXPECT_TRUE(parse_product_algorithms(to_yaml({}), "table").tables.empty());
}

TEST(ProductAlgorithms, TheCommittedTableIsWhole) {
  std::ifstream file(UPMOE_SOURCE_DIR "/configs/cuda/product_algorithms.yaml");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  EXPECT_EQ(to_yaml(committed_product_algorithms()), text) << "as the tool writes it";
}

std::string problem_of(const std::string& yaml) {
  try {
    parse_product_algorithms(yaml, "table.yaml");
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  return {};
}
std::string with_product(const std::string& product) {
  return "tables:\n  - device: NVIDIA H200\n    cublaslt: 130100\n    products:\n      - " + product + "\n";
}

TEST(ProductAlgorithms, ADamagedTableIsAnErrorInWords) {
  const std::string rest =
      ", k: 8, a: 'n', b: 't', in: bf16, out: bf16, adds: false, bias: false, alignment: 256";
  EXPECT_EQ(problem_of(with_product("{m: 8, n: 8" + rest + ", algorithm: 2}")), "");
  EXPECT_THAT(problem_of(""), HasSubstr("table.yaml"));
  EXPECT_THAT(problem_of("tables: 3\n"), HasSubstr("tables: not a list"));
  EXPECT_THAT(problem_of("tables: [\n"), HasSubstr("table.yaml"));
  EXPECT_THAT(problem_of("tables: []\nmore: 1\n"), HasSubstr("more"));
  EXPECT_THAT(problem_of("tables:\n  - device: NVIDIA H200\n    products: []\n"), HasSubstr("cublaslt"));
  EXPECT_THAT(problem_of(with_product("{m: 8, n: 8" + rest + "}")), HasSubstr("algorithm"));
  EXPECT_THAT(problem_of(with_product("{m: 8, n: 8" + rest + ", algorithm: 8}")), HasSubstr("algorithm"));
  EXPECT_THAT(problem_of(with_product("{m: 0, n: 8" + rest + ", algorithm: 1}")), HasSubstr("m: "));
  EXPECT_THAT(problem_of(with_product("{m: 8, n: 8, k: 8, a: x, b: 't', in: bf16, out: bf16, algorithm: 1}")),
              HasSubstr("'x' is none of n, t"));
  EXPECT_THAT(
      problem_of(with_product("{m: 8, n: 8, k: 8, a: 'n', b: 't', in: int8, out: bf16, algorithm: 1}")),
      HasSubstr("'int8' is none of fp32, bf16"));
  EXPECT_THAT(problem_of(with_product("{m: 8, n: 8" + rest.substr(0, rest.size() - 3) + "24, algorithm: 1}")),
              HasSubstr("24 is no power of two"));
  const std::string twice =
      "{m: 8, n: 8" + rest + ", algorithm: 2}\n      - {m: 8, n: 8" + rest + ", algorithm: 3}";
  EXPECT_THAT(problem_of(with_product(twice)), HasSubstr("a second line for 8 x 8 x 8, nt, bf16 to bf16"));
}

}  // namespace
}  // namespace upmoe
