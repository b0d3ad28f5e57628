#include "kernels/cuda/portable/row_sums.cuh"
#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/attention.h"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

constexpr int kMostPairs = 128;  // of a head: head_dim up to 256

// By value in the launch: the host takes them as the CPU does, and there is nothing to copy.
struct Frequencies {
  float at[kMostPairs];
};
Frequencies frequencies_of(const AttentionShape& shape, double theta) {
  const int half = static_cast<int>(shape.head_dim / 2);
  UPMOE_CHECK(half <= kMostPairs, "head_dim {}, at most {} on a GPU", shape.head_dim, 2 * kMostPairs);
  Frequencies frequency{};
  for (int i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(shape.head_dim);
    frequency.at[i] = 1.0f / std::pow(static_cast<float>(theta), exponent);
  }
  return frequency;
}

// A head's pairs are i and i + half, not neighbours:
//
//   head    | a0 a1 ... | b0 b1 ... |      (a, b) turns by the angle of pair i: (a cos - b sin, b cos + a sin)
//             half        half             the inverse turns back: sign -1 on the sine
//
// The sines of a token are the same in all its heads and are computed once, into shared memory. Keys follow the queries
// in qkv, so heads + kv_heads heads are turned, and the values behind them are not.
//
// The angle is rounded to fp32, as transformers does; its sine and cosine are taken in fp64, because an angle may have
// lost its fraction to a reduction in fp32.
template <class T>
__device__ inline void cos_and_sin(T& cosine, T& sine, std::int32_t position, float frequency) {
  const float angle = static_cast<float>(position) * frequency;
  cosine = from_float<T>(static_cast<float>(cos(static_cast<double>(angle))));
  sine = from_float<T>(static_cast<float>(sin(static_cast<double>(angle))));
}
// Which product is fused with the sum is said, so that all kernels have the same bits.
__device__ inline void turn(float& a, float& b, float c, float s) {
  const float left = a;
  a = fmaf(left, c, -(b * s));
  b = fmaf(b, c, left * s);
}

// One block, one token.
template <int N, class T>
__global__ void rotate(T* qkv, const std::int32_t* positions, Frequencies frequency, std::int64_t width,
                       int heads, int half, float sign) {
  __shared__ float cosine[kMostPairs], sine[kMostPairs];
  const std::int64_t t = blockIdx.x;
  for (int i = static_cast<int>(threadIdx.x); i < half; i += kThreads) {
    T c, s;
    cos_and_sin(c, s, positions[t], frequency.at[i]);
    cosine[i] = to_float(c);
    sine[i] = to_float(s) * sign;
  }
  __syncthreads();
  const int packs_of_half = half / N;
  for (int at = static_cast<int>(threadIdx.x); at < heads * packs_of_half; at += kThreads) {
    const int head = at / packs_of_half, i = at % packs_of_half * N;
    T* x = qkv + t * width + static_cast<std::int64_t>(head) * 2 * half + i;
    float a[N], b[N];
    load_floats(a, x);
    load_floats(b, x + half);
#pragma unroll
    for (int j = 0; j < N; ++j) turn(a[j], b[j], cosine[i + j], sine[i + j]);
    store_floats(x, a);
    store_floats(x + half, b);
  }
}

// Row t: the cosines of token t, then its sines; for blocks that have some heads of many tokens.
template <class T>
__global__ void fill_table(T* table, const std::int32_t* positions, Frequencies frequency,
                           std::int64_t tokens, int half) {
  const std::int64_t t = global_thread() / half;
  const auto i = static_cast<int>(global_thread() % half);
  if (t >= tokens) return;
  T* row = table + t * 2 * half;
  cos_and_sin(row[i], row[half + i], positions[t], frequency.at[i]);
}

struct HeadColumns {
  std::int64_t heads, turned, width;  // all heads, those of queries and keys, columns of a row
  int half;
};

// The blocks of sum_row_block and its order, with N columns of both halves of a head to a lane, so that the lane can
// turn them back before it adds them up.
template <int N, class T>
__global__ void turn_back_and_sum(float* partial, T* dqkv, const T* table, HeadColumns s,
                                  std::int64_t tokens) {
  __shared__ float memory[kRowsAtOnce][2 * N][kWarp];
  const int lane = static_cast<int>(threadIdx.x), group = static_cast<int>(threadIdx.y);
  const std::int64_t packs_of_half = s.half / N, pack = static_cast<std::int64_t>(blockIdx.x) * kWarp + lane;
  const std::int64_t head = pack / packs_of_half, i = pack % packs_of_half * N;
  const std::int64_t column = head * 2 * s.half + i;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kSumRows;
  const std::int64_t last = first + kSumRows < tokens ? first + kSumRows : tokens;
  float sum[2 * N] = {};
  if (head < s.heads) {
    for (std::int64_t t = first + group; t < last; t += kRowsAtOnce) {
      T* x = dqkv + t * s.width + column;
      float a[N], b[N];
      load_floats(a, x);
      load_floats(b, x + s.half);
      if (head < s.turned) {
        float c[N], sine[N];
        load_floats(c, table + t * 2 * s.half + i);
        load_floats(sine, table + t * 2 * s.half + s.half + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          turn(a[j], b[j], c[j], -sine[j]);
          a[j] = to_float(from_float<T>(a[j]));  // the sum is of what is stored
          b[j] = to_float(from_float<T>(b[j]));
        }
        store_floats(x, a);
        store_floats(x + s.half, b);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum[j] += a[j];
        sum[N + j] += b[j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2 * N; ++j) memory[group][j][lane] = sum[j];
  __syncthreads();
  if (group != 0 || head >= s.heads) return;
#pragma unroll
  for (int j = 0; j < 2 * N; ++j) {
    for (int g = 1; g < kRowsAtOnce; ++g) sum[j] += memory[g][j][lane];
    partial[blockIdx.y * s.width + column + (j < N ? j : s.half + j - N)] = sum[j];
  }
}

}  // namespace

void rope(Exec& ex, TensorView qkv_TH, ConstTensorView positions_T, AttentionShape shape, double theta,
          bool inverse) {
  const int half = static_cast<int>(shape.head_dim / 2);
  const Frequencies frequency = frequencies_of(shape, theta);
  with_float_type(qkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kPack<T>;
    const bool wide = half % N == 0 && packs<N>(shape.qkv_width(), qkv_TH.as<T>());
    launch(ex, static_cast<unsigned>(qkv_TH.shape[0]), kThreads, wide ? rotate<N, T> : rotate<1, T>,
           qkv_TH.as<T>(), positions_T.as<std::int32_t>(), frequency, shape.qkv_width(),
           static_cast<int>(shape.heads + shape.kv_heads), half, inverse ? -1.0f : 1.0f);
  });
}

void rope_backward(Exec& ex, TensorView dqkv_TH, GradientView db_H, ConstTensorView positions_T,
                   AttentionShape shape, double theta) {
  const int half = static_cast<int>(shape.head_dim / 2);
  const Frequencies frequency = frequencies_of(shape, theta);
  const std::int64_t tokens = dqkv_TH.shape[0], width = shape.qkv_width();
  if (tokens == 0 && db_H.adds()) return;
  const unsigned blocks = blocks_for(tokens, kSumRows);
  const HeadColumns columns{shape.heads + 2 * shape.kv_heads, shape.heads + shape.kv_heads, width, half};
  ScratchScope scope(*ex.scratch);
  auto* partial = ex.scratch->take({blocks, width}, DType::kF32, "sums of rows").as<float>();
  const TensorView table_TC = ex.scratch->take({tokens, 2 * half}, dqkv_TH.dtype, "rope table");
  with_float_type(dqkv_TH.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kPack<T>;
    const bool wide = half % N == 0 && packs<N>(width, dqkv_TH.as<T>());
    launch(ex, blocks_for(tokens * half, kThreads), kThreads, fill_table<T>, table_TC.as<T>(),
           positions_T.as<std::int32_t>(), frequency, tokens, half);
    launch(ex, dim3(blocks_for(columns.heads * half, kWarp * (wide ? N : 1)), blocks),
           dim3(kWarp, kRowsAtOnce), wide ? turn_back_and_sum<N, T> : turn_back_and_sum<1, T>, partial,
           dqkv_TH.as<T>(), table_TC.as<T>(), columns, tokens);
  });
  with_float_type(db_H.dtype, [&](auto type) {
    using B = decltype(type);
    launch(ex, blocks_for(width, kThreads), kThreads, add_row_blocks<B>, db_H.as<B>(), partial, blocks, width,
           db_H.adds());
  });
}

}  // namespace upmoe::cuda
