#pragma once
// What the GPU benchmarks share: the device, random tensors, times between points where the stream is empty,
// and the two limits that each result is a share of, measured in the same run.

#include <benchmark/benchmark.h>

#include <functional>
#include <memory>
#include <string>

#include "kernels/core/exec.h"
#include "kernels/core/memory.h"

namespace upmoe::bench {

// Of Qwen1.5-MoE-A2.7B; `small` tries the program where time is short.
struct ModelShape {
  std::int64_t width = 2048, heads = 16, head_dim = 128, expert_width = 1408, shared_width = 5632,
               experts = 60, top_k = 4, vocab = 151936, seq_len = 2048;
};
const ModelShape& shape();
void use_small_shape();

Exec& exec();  // of the device; made at the first call

// A tensor with its own memory on the device: floats between -1 and 1, or whole numbers below `limit`.
struct Tensor {
  Buffer memory;
  TensorView view;
  Tensor(Shape shape, DType dtype, std::int64_t limit = 0);
};
using Held = std::shared_ptr<Tensor>;
inline Held make(Shape s, DType dtype = DType::kBF16, std::int64_t limit = 0) {
  return std::make_shared<Tensor>(s, dtype, limit);
}
Held shuffled(Shape s);  // [0, n) in another order, as kI32

double seconds_of(const std::function<void()>& work);  // the median of five goes of many calls each
double flops_of_cube();                                // per second, measured at each call: as below
double peak_flops();  // per second: the product of two 8192 x 8192 bf16 matrices (512 when small)
double peak_bytes();  // per second: a sum of two arrays into a third

// Registers a benchmark that times `op`, whose cost is what it books. Counters: tflops, gbytes (per second);
// share: of the slower of both limits; of_gemm: of peak_flops() (models: of their FLOPs).
using Op = std::function<void(Exec&)>;
void add(const std::string& name, const std::function<Op()>& make);

void add_ops(std::int64_t tokens);
void add_routers(const std::string& name, std::int64_t tokens);  // of the ops
void add_apart(std::int64_t tokens);                             // passes that one op does in one, apart
void add_layer(std::int64_t tokens);

}  // namespace upmoe::bench
