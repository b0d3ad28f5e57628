#pragma once
// Sums over the rows of a tensor, for weight gradients: fixed blocks of rows, then block after block. The
// order depends on the number of rows alone.

#include "kernels/cuda/launch.cuh"

namespace upmoe::cuda {

constexpr int kSumRows = 512;   // of one block
constexpr int kRowsAtOnce = 8;  // a block of threads is 8 rows by a warp of columns

template <class Value>
__global__ void sum_row_block(float* partial, Value value, std::int64_t rows, std::int64_t width) {
  __shared__ float memory[kRowsAtOnce][kWarp];
  const int lane = static_cast<int>(threadIdx.x), group = static_cast<int>(threadIdx.y);
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kWarp + lane;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kSumRows;
  const std::int64_t last = first + kSumRows < rows ? first + kSumRows : rows;
  float sum = 0;
  if (column < width)
    for (std::int64_t t = first + group; t < last; t += kRowsAtOnce) sum += value(t, column);
  memory[group][lane] = sum;
  __syncthreads();
  if (group != 0 || column >= width) return;
  for (int g = 1; g < kRowsAtOnce; ++g) sum += memory[g][lane];
  partial[blockIdx.y * width + column] = sum;
}

template <class T>
__global__ void add_row_blocks(T* total, const float* partial, std::int64_t blocks, std::int64_t width) {
  const std::int64_t column = global_thread();
  if (column >= width) return;
  float sum = 0;
  for (std::int64_t b = 0; b < blocks; ++b) sum += partial[b * width + column];
  total[column] = from_float<T>(to_float(total[column]) + sum);
}

// total[c] += sum over t < rows of value(t, c), in fp32. `value` is a functor for the device.
template <class Value>
void sum_columns(const Exec& ex, const TensorView& total, const Value& value, std::int64_t rows) {
  const std::int64_t width = total.elements(), blocks = blocks_for(rows, kSumRows);
  if (rows == 0 || width == 0) return;
  ScratchScope scope(*ex.scratch);
  auto* partial = ex.scratch->take({blocks, width}, DType::kF32, "sums of rows").as<float>();
  launch(ex, dim3(blocks_for(width, kWarp), static_cast<unsigned>(blocks)), dim3(kWarp, kRowsAtOnce),
         sum_row_block<Value>, partial, value, rows, width);
  with_float_type(total.dtype, [&](auto type) {
    using T = decltype(type);
    launch(ex, blocks_for(width, kThreads), kThreads, add_row_blocks<T>, total.as<T>(), partial, blocks,
           width);
  });
}

}  // namespace upmoe::cuda
