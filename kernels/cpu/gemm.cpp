#include "kernels/ops/gemm.h"

#include <oneapi/dnnl/dnnl.hpp>

#include <map>
#include <tuple>
#include <unordered_map>

#include "kernels/cpu/element_type.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/row_sums.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// What a oneDNN primitive is compiled for. The number of threads belongs to it: it decides the blocking.
struct GemmKey {
  std::int64_t m, n, k, threads;
  bool transpose_a, transpose_b, add, bias;
  DType in, out;
  auto tied() const { return std::tie(m, n, k, threads, transpose_a, transpose_b, add, bias, in, out); }
  friend bool operator<(const GemmKey& x, const GemmKey& y) { return x.tied() < y.tied(); }
};

// A compiled product and its arguments, whose addresses change from call to call.
struct CompiledGemm {
  dnnl::matmul primitive;
  dnnl::memory a, b, c, bias, scratch;
  std::int64_t scratch_bytes = 0;
  std::unordered_map<int, dnnl::memory> arguments;
};

dnnl::memory::data_type data_type_of(DType dtype) {
  return dtype == DType::kBF16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

// A row-major [rows, columns], or its transpose stored as [columns, rows].
dnnl::memory::desc matrix(std::int64_t rows, std::int64_t columns, DType dtype, bool transposed) {
  const dnnl::memory::dims strides =
      transposed ? dnnl::memory::dims{1, rows} : dnnl::memory::dims{columns, 1};
  return {{rows, columns}, data_type_of(dtype), strides};
}

CompiledGemm compile(const GemmKey& key, const dnnl::engine& engine) {
  const auto a = matrix(key.m, key.k, key.in, key.transpose_a);
  const auto b = matrix(key.k, key.n, key.in, key.transpose_b);
  const auto c = matrix(key.m, key.n, key.out, false);
  const auto bias = matrix(1, key.n, key.in, false);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);  // ops do not allocate
  if (key.add) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
  const auto operation = key.bias ? dnnl::matmul::desc(a, b, bias, c) : dnnl::matmul::desc(a, b, c);
  const dnnl::matmul::primitive_desc description(operation, attributes, engine);
  CompiledGemm gemm{dnnl::matmul(description),
                    dnnl::memory(a, engine, nullptr),
                    dnnl::memory(b, engine, nullptr),
                    dnnl::memory(c, engine, nullptr),
                    dnnl::memory(bias, engine, nullptr),
                    dnnl::memory(description.scratchpad_desc(), engine, nullptr),
                    static_cast<std::int64_t>(description.scratchpad_desc().get_size()),
                    {}};
  gemm.arguments = {{DNNL_ARG_SRC, gemm.a},
                    {DNNL_ARG_WEIGHTS, gemm.b},
                    {DNNL_ARG_DST, gemm.c},
                    {DNNL_ARG_SCRATCHPAD, gemm.scratch}};
  if (key.bias) gemm.arguments[DNNL_ARG_BIAS] = gemm.bias;
  return gemm;
}

// One per thread that calls ops, so that ranks as threads share nothing.
struct GemmCache {
  // A model has some dozens of shapes. More means a shape that varies without end; then start over rather
  // than grow.
  static constexpr std::size_t kMostShapes = 1024;
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<GemmKey, CompiledGemm> gemms;

  CompiledGemm& get(const GemmKey& key) {
    const auto found = gemms.find(key);
    if (found != gemms.end()) return found->second;
    if (gemms.size() >= kMostShapes) gemms.clear();
    return gemms.emplace(key, compile(key, engine)).first->second;
  }
};

void* address(ConstTensorView t) {
  return const_cast<std::byte*>(t.data);  // oneDNN's interface knows no const; inputs are only read
}

void multiply(Exec& ex, const GemmKey& key, const TensorView& c_MN, const ConstTensorView& a,
              const ConstTensorView& b, const ConstTensorView* bias_N) {
  try {
    thread_local GemmCache cache;
    CompiledGemm& gemm = cache.get(key);
    ScratchScope scope(*ex.scratch);
    gemm.a.set_data_handle(address(a));
    gemm.b.set_data_handle(address(b));
    gemm.c.set_data_handle(c_MN.data);
    if (bias_N != nullptr) gemm.bias.set_data_handle(address(*bias_N));
    gemm.scratch.set_data_handle(ex.scratch->take({(gemm.scratch_bytes + 3) / 4}, DType::kF32, "gemm").data);
    gemm.primitive.execute(cache.stream, gemm.arguments);
    cache.stream.wait();
  } catch (const dnnl::error& e) {
    fail(ExitCode::kFailure, "gemm: oneDNN refused {} x {} x {} of {}: {} (status {})", key.m, key.n, key.k,
         name_of(key.in), e.what(), static_cast<int>(e.status));
  }
}

// The product over nothing: zeros or the bias.
void store_empty_product(const TensorView& c_MN, const ConstTensorView* bias_N) {
  const std::int64_t columns = c_MN.shape[1];
  with_float_type(c_MN.dtype, [&](auto out) {
    using Out = decltype(out);
    with_float_type(bias_N != nullptr ? bias_N->dtype : DType::kF32, [&](auto in) {
      using T = decltype(in);
      for (std::int64_t i = 0; i < c_MN.elements(); ++i)
        c_MN.as<Out>()[i] =
            from_float<Out>(bias_N != nullptr ? to_float(bias_N->as<T>()[i % columns]) : 0.0f);
    });
  });
}

}  // namespace

void gemm(Exec& ex, TensorView c_MN, ConstTensorView a, Transpose transpose_a, ConstTensorView b,
          Transpose transpose_b, Accumulate mode, const ConstTensorView* bias_N) {
  const bool transposed_a = transpose_a == Transpose::kYes;
  const std::int64_t depth = a.shape[transposed_a ? 0 : 1];
  if (c_MN.elements() == 0) return;
  if (depth == 0) {  // oneDNN leaves the output alone then
    if (mode == Accumulate::kOverwrite) store_empty_product(c_MN, bias_N);
    return;
  }
  const GemmKey key{c_MN.shape[0],
                    c_MN.shape[1],
                    depth,
                    worker_count(),
                    transposed_a,
                    transpose_b == Transpose::kYes,
                    mode == Accumulate::kAdd,
                    bias_N != nullptr,
                    a.dtype,
                    c_MN.dtype};
  multiply(ex, key, c_MN, a, b, bias_N);
}

void bias_backward(Exec& ex, TensorView db_N, ConstTensorView dy_TN) {
  const std::int64_t rows = dy_TN.shape[0], width = dy_TN.shape[1];
  if (rows == 0) return;
  ScratchScope scope(*ex.scratch);
  auto* partials = ex.scratch->take({row_blocks(rows), width}, DType::kF32, "bias_backward sums").as<float>();
  with_float_type(dy_TN.dtype, [&](auto type) {
    using T = decltype(type);
    const T* dy = dy_TN.as<T>();
    for_row_blocks(partials, rows, width, [&](std::int64_t first, std::int64_t last, float* partial) {
      for (std::int64_t t = first; t < last; ++t)
        for_lanes(width, [&](std::int64_t i, auto lanes) {
          store(partial + i, load(partial + i, lanes) + load(dy + t * width + i, lanes), lanes);
        });
    });
  });
  add_row_blocks(db_N, partials, row_blocks(rows));
}

}  // namespace upmoe::cpu
