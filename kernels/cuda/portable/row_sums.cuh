#pragma once
// Sums over the rows of a tensor, for weight gradients: fixed blocks of rows, then block after block. The
// order depends on the number of rows alone.

#include "kernels/cuda/runtime/launch.cuh"

namespace upmoe::cuda {

constexpr int kSumRows = 512;   // of one block
constexpr int kRowsAtOnce = 8;  // a block of threads is 8 rows by a warp of columns

// A block of 32 x 8 threads has kSumRows rows of 32 N columns:
//
//                lane 0 | lane 1 | ... | lane 31       neighbours load neighbouring columns
//   row 0        group 0
//   row 1        group 1
//   ...
//   row 7        group 7                               then the groups' sums are added in their order
//   row 8        group 0 again ...                     -> row blockIdx.y of `partial`
//
// A lane has N columns, whose values in row t are value.at(out, t, first column).
template <int N, class Value>
__global__ void sum_row_block(float* partial, Value value, std::int64_t rows, std::int64_t width) {
  __shared__ float memory[kRowsAtOnce][N][kWarp];
  const int lane = static_cast<int>(threadIdx.x), group = static_cast<int>(threadIdx.y);
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.x) * kWarp + lane) * N;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kSumRows;
  const std::int64_t last = first + kSumRows < rows ? first + kSumRows : rows;
  float sum[N] = {};
  if (column < width) {
#pragma unroll 4
    for (std::int64_t t = first + group; t < last; t += kRowsAtOnce) {
      float v[N];
      value.at(v, t, column);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += v[j];
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) memory[group][j][lane] = sum[j];
  __syncthreads();
  if (group != 0 || column >= width) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    for (int g = 1; g < kRowsAtOnce; ++g) sum[j] += memory[g][j][lane];
    partial[blockIdx.y * width + column + j] = sum[j];
  }
}

template <class T>
__global__ void add_row_blocks(T* total, const float* partial, std::int64_t blocks, std::int64_t width,
                               bool add) {
  const std::int64_t column = global_thread();
  if (column >= width) return;
  float sum = 0;
  for (std::int64_t b = 0; b < blocks; ++b) sum += partial[b * width + column];
  total[column] = from_float<T>(add ? to_float(total[column]) + sum : sum);
}

// Rows as they are, for sum_columns.
template <class T>
struct Rows {
  const T* x;
  std::int64_t width;
  template <int N>
  __device__ void at(float (&out)[N], std::int64_t t, std::int64_t c) const {
    load_floats(out, x + t * width + c);
  }
};

// total[c] (+)= sum over t < rows of what value.at(out, t, c) says of N columns, in fp32. `value` is a functor
// for the device; N divides the width.
template <int N, class Value>
void sum_columns(const Exec& ex, const GradientView& total, const Value& value, std::int64_t rows) {
  const std::int64_t width = total.elements(), blocks = blocks_for(rows, kSumRows);
  if (width == 0 || (rows == 0 && total.adds())) return;
  ScratchScope scope(*ex.scratch);
  auto* partial = ex.scratch->take({blocks, width}, DType::kF32, "sums of rows").as<float>();
  launch(ex, dim3(blocks_for(width, kWarp * N), static_cast<unsigned>(blocks)), dim3(kWarp, kRowsAtOnce),
         sum_row_block<N, Value>, partial, value, rows, width);
  with_float_type(total.dtype, [&](auto type) {
    using T = decltype(type);
    launch(ex, blocks_for(width, kThreads), kThreads, add_row_blocks<T>, total.as<T>(), partial, blocks,
           width, total.adds());
  });
}
// In packs of 16 bytes where the rows of these tensors allow it.
template <class Value, class T, class... More>
void sum_wide_columns(const Exec& ex, const GradientView& total, const Value& value, std::int64_t rows,
                      const T* first, const More*... more) {
  if (packs<kPack<T>>(total.elements(), first, more...)) return sum_columns<kPack<T>>(ex, total, value, rows);
  sum_columns<1>(ex, total, value, rows);
}

}  // namespace upmoe::cuda
