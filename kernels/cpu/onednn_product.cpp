// Dense products by oneDNN: compiled at run time for each shape, and kept.

#include <oneapi/dnnl/dnnl.hpp>

#include <map>
#include <tuple>
#include <unordered_map>

#include "kernels/cpu/dense_product.h"
#include "kernels/cpu/parallel_for.h"

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
  // A model has some dozens of shapes. More means a shape that varies without end; then start over rather than grow.
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

GemmKey key_of(const DenseProduct& p) {
  return {p.rows(),
          p.columns(),
          p.depth(),
          worker_count(),
          p.a_MK.transposed(),
          p.b_KN.transposed(),
          p.mode == Accumulate::kAdd,
          p.bias_N.given(),
          p.a_MK.stored.dtype,
          p.c_MN.dtype};
}

bool has_instructions(unsigned wanted) {
  return (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & wanted) == wanted;
}

}  // namespace

void multiply_by_onednn(Exec& ex, const DenseProduct& p) {
  try {
    // Compiling takes up to a millisecond, as long as a small product; a run meets each of its shapes in the first
    // step.
    thread_local GemmCache cache;
    CompiledGemm& gemm = cache.get(key_of(p));
    ScratchScope scope(*ex.scratch);
    gemm.a.set_data_handle(address(p.a_MK.stored));
    gemm.b.set_data_handle(address(p.b_KN.stored));
    gemm.c.set_data_handle(p.c_MN.data);
    if (p.bias_N.given()) gemm.bias.set_data_handle(address(p.bias_N));
    gemm.scratch.set_data_handle(ex.scratch->take({(gemm.scratch_bytes + 3) / 4}, DType::kF32, "gemm").data);
    gemm.primitive.execute(cache.stream, gemm.arguments);
    cache.stream.wait();
  } catch (const dnnl::error& e) {
    fail(ExitCode::kFailure, "gemm: oneDNN refused {} x {} x {} of {}: {} (status {})", p.rows(), p.columns(),
         p.depth(), name_of(p.a_MK.stored.dtype), e.what(), static_cast<int>(e.status));
  }
}

// Support goes by dtypes: for those it knows, the library has a plain loop that takes every shape.
bool onednn_computes(DType in, DType out) {
  try {
    compile({2, 2, 2, 1, false, false, false, false, in, out}, dnnl::engine(dnnl::engine::kind::cpu, 0));
    return true;
  } catch (const dnnl::error& e) {
    if (e.status == dnnl_unimplemented) return false;
    fail(ExitCode::kFailure, "gemm: oneDNN cannot be used: {} (status {})", e.what(),
         static_cast<int>(e.status));
  }
}

bool onednn_has_bf16_instruction() {
  return has_instructions(dnnl_cpu_isa_avx512_core_bf16);
}

bool onednn_has_matrix_registers() {
  return has_instructions(dnnl_cpu_isa_avx512_core_amx);
}

bool onednn_has_avx512() {
  return has_instructions(dnnl_cpu_isa_avx512_core);
}

}  // namespace upmoe::cpu
