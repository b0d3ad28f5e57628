// Times the algorithms that cuBLASLt offers for the dense products of Qwen1.5-MoE-A2.7B, and writes the table of those
// that beat its first (kernels/core/product_algorithms.h), with what a file has of other devices and versions:
//
//   time_algorithms configs/cuda/product_algorithms.yaml [--tokens 8192,16384,32768]
//
// The first stays where another is not faster by more than --gain: the clock is worth no change of bits.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <random>

#include "configs/product_algorithms.h"
#include "configs/timed_tables.h"
#include "configs/yaml_reader.h"
#include "kernels/core/bf16.h"
#include "kernels/core/gpu.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/transfer.h"
#include "trainer/rank_model.h"

namespace upmoe {
namespace {

struct Options {
  std::filesystem::path file;
  std::vector<std::int64_t> tokens{8192, 16384, 32768};
  double gain = 0.01;
  bool small = false;  // tries the program where time is short
};

// y [T, N] = x [T, K] w [N, K]^T.
struct Layer {
  std::int64_t n = 0, k = 0;
  bool bias = false;
};

class Products {
 public:
  explicit Products(const Options& options)
      : options_(options), memory_(Device{DeviceType::kCuda, 0}), ex_(memory_.exec) {}

  AlgorithmOfShape fastest() {
    const std::int64_t width = options_.small ? 64 : 2048, shared = options_.small ? 96 : 5632;
    const Layer layers[] = {{3 * width, width, true}, {width, width}, {2 * shared, width}, {width, shared}};
    AlgorithmOfShape table;
    for (const std::int64_t t : options_.tokens)
      for (const Layer& l : layers) {
        try_all({.m = t, .n = l.n, .k = l.k, .transpose_b = true, .bias = l.bias}, table);
        try_all({.m = t, .n = l.k, .k = l.n}, table);
        for (const bool adds : {false, true})
          try_all({.m = l.n, .n = l.k, .k = t, .transpose_a = true, .adds = adds}, table);
      }
    return table;
  }

 private:
  // A matrix of numbers between -1 and 1: zeros cost less power, and clocks rise.
  Buffer matrix(std::int64_t elements) const {
    Buffer memory = Buffer::allocate(ex_.device, static_cast<std::size_t>(elements) * 2);
    std::vector<bf16> values(1 << 20);
    std::minstd_rand random(1);
    std::uniform_real_distribution<float> value(-1, 1);
    for (bf16& v : values) v = to_bf16(value(random));
    const TensorView whole = memory.view({elements}, DType::kBF16);
    for (std::int64_t begin = 0; begin < elements; begin += 1 << 20) {
      const std::int64_t end = std::min<std::int64_t>(elements, begin + (1 << 20));
      ops::upload(ex_, whole.rows(begin, end),
                  host_view(static_cast<const bf16*>(values.data()), {end - begin}));
    }
    return memory;
  }

  void try_all(ProductShape shape, AlgorithmOfShape& table) {
    shape.in = shape.out = DType::kBF16;
    if (table.count(shape) != 0) return;
    const Buffer a = matrix(shape.m * shape.k), b = matrix(shape.k * shape.n), c = matrix(shape.m * shape.n),
                 bias = matrix(shape.n);
    const auto stored = [](const Buffer& memory, std::int64_t rows, std::int64_t columns, bool transposed) {
      return memory.view(transposed ? Shape{columns, rows} : Shape{rows, columns}, DType::kBF16);
    };
    const auto kind = [](bool transposed) { return transposed ? Transpose::kYes : Transpose::kNo; };
    const Factor left{stored(a, shape.m, shape.k, shape.transpose_a), kind(shape.transpose_a)},
        right{stored(b, shape.k, shape.n, shape.transpose_b), kind(shape.transpose_b)};
    const ConstTensorView bias_N = shape.bias ? bias.view({shape.n}, DType::kBF16) : TensorView{};
    const auto multiply = [&] {
      ops::gemm(ex_, c.view({shape.m, shape.n}, DType::kBF16), left, right,
                shape.adds ? Accumulate::kAdd : Accumulate::kOverwrite, bias_N);
    };
    std::vector<double> seconds;
    for (int place = 0; place < kOfferedAlgorithms; ++place)
      if (const double s = seconds_of(shape, place, multiply); s > 0) seconds.push_back(s);
    const auto best = static_cast<int>(std::min_element(seconds.begin(), seconds.end()) - seconds.begin());
    const double flops = 2.0 * static_cast<double>(shape.m) * static_cast<double>(shape.n * shape.k);
    fmt::print("{}: first {:.1f} TFLOP/s, best of {} is {}: {:.1f}\n", words_of(shape),
               flops / seconds[0] * 1e-12, seconds.size(), best,
               flops / seconds[static_cast<std::size_t>(best)] * 1e-12);
    if (seconds[static_cast<std::size_t>(best)] * (1 + options_.gain) < seconds[0])
      table.emplace(shape, best);
  }

  // The better of two goes, behind one that is not counted; 0 where the library offers no such algorithm.
  template <class Multiply>
  double seconds_of(const ProductShape& shape, int place, const Multiply& multiply) {
    ProductAlgorithms one;
    one.tables[library_] = {{shape, place}};
    ex_.algorithms = &one;
    double best = 0;
    try {
      multiply();
      const int times = options_.small ? 2 : 10;
      for (int go = 0; go < 3; ++go) {
        gpu::Event begin(true), end(true);
        begin.record(*ex_.stream);
        for (int i = 0; i < times; ++i) multiply();
        end.record(*ex_.stream);
        ex_.stream->synchronize();
        const double seconds = std::max(end.seconds_since(begin) / times, 1e-9);
        if (go == 1 || (go == 2 && seconds < best)) best = seconds;
      }
    } catch (const Error& e) {
      if (place == 0) throw;  // else fewer are offered
    }
    ex_.algorithms = nullptr;
    return best;
  }

  Options options_;
  RankMemory memory_;
  Exec& ex_;
  ProductLibrary library_ = gpu::product_library();
};

void run(const Options& options) {
  gpu::use(0);
  ProductAlgorithms all;
  if (std::filesystem::exists(options.file))
    all = parse_product_algorithms(read_text_file(options.file), options.file.string());
  const ProductLibrary library = gpu::product_library();
  fmt::print("{}, cuBLASLt {}\n", library.device, library.version);
  all.tables[library] = Products(options).fastest();
  write_timed_tables(options.file, to_yaml(all));
}

}  // namespace
}  // namespace upmoe

int main(int argc, char** argv) {
  upmoe::Options options;
  CLI::App app("Times cuBLASLt's algorithms and writes the table of the best");
  app.add_option("file", options.file)->required();
  app.add_option("--tokens", options.tokens)->delimiter(',');
  app.add_option("--gain", options.gain);
  app.add_flag("--small", options.small);
  CLI11_PARSE(app, argc, argv);
  if (options.small) options.tokens = {32, 48};
  try {
    upmoe::run(options);
  } catch (const upmoe::Error& e) {
    std::fprintf(stderr, "time_algorithms: error: %s\n", e.what());
    return static_cast<int>(e.code());
  }
}
