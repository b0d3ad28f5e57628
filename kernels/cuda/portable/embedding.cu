#include "kernels/ops/embedding.h"

#include <utility>

#include "kernels/cuda/portable/counting_sort.cuh"
#include "kernels/ops/backend.h"

namespace upmoe::cuda {

namespace {

// One block, one token. Rows are bytes here, moved in words of W.
template <class W>
__global__ void copy_rows(W* x, const std::int32_t* tokens, const W* w, std::int64_t words,
                          std::int64_t begin, std::int64_t rows, std::int64_t vocab, FindingWords findings) {
  const std::int64_t t = blockIdx.x;
  const std::int32_t token = tokens[t];
  const std::int64_t row = token - begin;
  if ((token < 0 || token >= vocab) && threadIdx.x == 0)
    find(findings, Finding::kToken, t, static_cast<std::uint32_t>(token));
  const bool held = token >= 0 && token < vocab && row >= 0 && row < rows;
  for (std::int64_t i = threadIdx.x; i < words; i += kThreads)
    x[t * words + i] = held ? w[row * words + i] : W{};
}

// The gradient of an embedding row is a sum over the positions that hold its token. To give every row one writer, and
// its sum an order, the positions are sorted by token first, by a radix sort of 8 bits a pass:
//
//   position   0   1   2   3   4   5          order   2   5 | 0   3 | 4 | -1
//   token      7   9   3   7   8   3    ->    token   3   3   7   7   8        (9 is held by another shard)
//
// One digit of the tokens of the positions in `from`; -1 where there is no position or another shard holds its token.
struct TokenDigit {
  const std::int32_t *tokens, *from;  // from: null means position i is i
  std::int64_t begin, rows, vocab;
  int shift;
  FindingWords findings;  // null after the first pass
  __device__ std::int32_t operator()(std::int64_t i) const {
    const std::int64_t t = from != nullptr ? from[i] : i;
    if (t < 0) return -1;
    const std::int32_t token = tokens[t];
    if (token < 0 || token >= vocab) {
      if (findings != nullptr) find(findings, Finding::kToken, t, static_cast<std::uint32_t>(token));
      return -1;
    }
    if (token < begin || token >= begin + rows) return -1;
    return (token - static_cast<std::int32_t>(begin)) >> shift & 255;
  }
};
struct MovePosition {
  const std::int32_t* from;
  std::int32_t* to;
  __device__ void operator()(std::int64_t i, std::int32_t place) const {
    if (place >= 0) to[place] = from != nullptr ? from[i] : static_cast<std::int32_t>(i);
  }
};

// In the picture above blocks 0, 2 and 4 work; 1 and 3 see that an earlier one has their token, 5 that it has none.
// One block for each sorted position; the first of a token works, for all of that token in the order of
// positions, whose rows it loads a few at a time.
template <int N, class T, class Out>
__global__ void add_token_rows(Out* dw, const T* dx, const std::int32_t* tokens, const std::int32_t* order,
                               std::int64_t positions, std::int64_t begin, std::int64_t width) {
  constexpr int kAtOnce = 4;
  const std::int64_t first = blockIdx.x;
  if (order[first] < 0) return;
  const std::int32_t token = tokens[order[first]];
  if (first > 0 && tokens[order[first - 1]] == token) return;
  Out* row = dw + (token - begin) * width;
  for (std::int64_t c = threadIdx.x * N; c < width; c += kThreads * N) {
    float sum[N];
    load_floats(sum, row + c);
    bool more = true;
    for (std::int64_t i = first; more; i += kAtOnce) {
      float v[kAtOnce][N] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        // `more` stays false once the token has changed: what is behind it is neither loaded nor added.
        const std::int32_t t = i + j < positions ? order[i + j] : -1;
        more = more && t >= 0 && tokens[t] == token;
        if (more) load_floats(v[j], dx + t * width + c);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += v[j][n];
    }
    store_floats(row + c, sum);
  }
}

// The positions sorted by token, equal tokens in the order of their positions: eight bits at a time. Behind
// the last position stands -1.
const std::int32_t* sort_positions(const Exec& ex, const std::int32_t* tokens, std::int64_t count,
                                   std::int64_t rows, const VocabShard& shard) {
  auto* totals = ex.scratch->take({256}, DType::kI32, "embedding_backward digits").as<std::int32_t>();
  auto* to = ex.scratch->take({count}, DType::kI32, "embedding_backward order").as<std::int32_t>();
  auto* other = ex.scratch->take({count}, DType::kI32, "embedding_backward order").as<std::int32_t>();
  const std::int32_t* from = nullptr;
  // As many passes as the shard's row numbers have bytes. Each pass is stable, so the lower bytes stay sorted below the
  // higher ones; what a pass leaves out has no place, and -1 in `to` says so to the next pass and to add_token_rows.
  for (int shift = 0; shift == 0 || ((rows - 1) >> shift) > 0; shift += 8) {
    check(cudaMemsetAsync(to, 0xff, static_cast<std::size_t>(count) * sizeof *to, stream_of(ex).raw()));
    const TokenDigit digit{
        tokens, from, shard.begin, rows, shard.total, shift, shift == 0 ? stream_of(ex).findings() : nullptr};
    counting_sort(ex, count, 256, digit, MovePosition{from, to}, totals);
    from = to;
    std::swap(to, other);
  }
  return from;
}

template <class W>
void launch_copy(const Exec& ex, const TensorView& x_TD, const ConstTensorView& tokens_T,
                 const ConstTensorView& w_VD, const VocabShard& shard) {
  const auto words =
      static_cast<std::int64_t>(static_cast<std::size_t>(w_VD.shape[1]) * size_of(w_VD.dtype) / sizeof(W));
  launch(ex, static_cast<unsigned>(tokens_T.shape[0]), kThreads, copy_rows<W>,
         reinterpret_cast<W*>(x_TD.data), tokens_T.as<std::int32_t>(), reinterpret_cast<const W*>(w_VD.data),
         words, shard.begin, w_VD.shape[0], shard.total, stream_of(ex).findings());
}

}  // namespace

void embedding_forward(Exec& ex, TensorView x_TD, ConstTensorView tokens_T, ConstTensorView w_VD,
                       VocabShard shard) {
  stream_of(ex).limit(Finding::kToken, shard.total);
  const auto bytes = static_cast<std::int64_t>(static_cast<std::size_t>(w_VD.shape[1]) * size_of(w_VD.dtype));
  using Wide = Pack<std::uint32_t, 4>;
  if (packs<16>(bytes, x_TD.data, w_VD.data)) return launch_copy<Wide>(ex, x_TD, tokens_T, w_VD, shard);
  launch_copy<std::uint16_t>(ex, x_TD, tokens_T, w_VD, shard);
}

void embedding_backward(Exec& ex, GradientView dw_VD, ConstTensorView dx_TD, ConstTensorView tokens_T,
                        VocabShard shard) {
  const std::int64_t count = tokens_T.shape[0], rows = dw_VD.shape[0], width = dw_VD.shape[1];
  if (!dw_VD.adds()) fill(ex, dw_VD, 0.0f);
  if (count == 0 || rows == 0) return;
  const auto* tokens = tokens_T.as<std::int32_t>();
  stream_of(ex).limit(Finding::kToken, shard.total);
  ScratchScope scope(*ex.scratch);
  const std::int32_t* order = sort_positions(ex, tokens, count, rows, shard);
  with_float_type(dx_TD.dtype, [&](auto in_type) {
    with_float_type(dw_VD.dtype, [&](auto out_type) {
      using T = decltype(in_type);
      using Out = decltype(out_type);
      constexpr int N = kPack<T>;
      const bool wide = packs<N>(width, dw_VD.as<Out>(), dx_TD.as<T>());
      launch(ex, static_cast<unsigned>(count), kThreads,
             wide ? add_token_rows<N, T, Out> : add_token_rows<1, T, Out>, dw_VD.as<Out>(), dx_TD.as<T>(),
             tokens, order, count, shard.begin, width);
    });
  });
}

}  // namespace upmoe::cuda
