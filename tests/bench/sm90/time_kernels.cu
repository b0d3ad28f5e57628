// How fast the experts' kernels are: TFLOP/s of useful products, beside cuBLASLt's 8192^3 before and after,
// and beside one cuBLASLt product for each expert on several streams. Rows are balanced, as an untrained router gives
// them, or the e-th expert has 1 / e of what the first one has (zipf).

#include <cublasLt.h>

#include <string>

#include "tests/bench/sm90/experts.cuh"

namespace sm90_bench {

namespace {

constexpr int kExperts = 60, kWidth = 2048, kNeurons = 1408, kChoices = 4;

void check_lt(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "%s: status %d\n", what, static_cast<int>(status));
  std::_Exit(3);
}

// Median of some runs, in milliseconds.
template <class Body>
double time_of(const Body& body, int runs = 9) {
  cudaEvent_t begin, end;
  CHECK_GPU(cudaEventCreate(&begin));
  CHECK_GPU(cudaEventCreate(&end));
  for (int i = 0; i < 2; ++i) body();
  CHECK_GPU(cudaDeviceSynchronize());
  std::vector<float> times;
  for (int i = 0; i < runs; ++i) {
    float ms = 0;
    CHECK_GPU(cudaEventRecord(begin));
    body();
    CHECK_GPU(cudaEventRecord(end));
    CHECK_GPU(cudaEventSynchronize(end));
    CHECK_GPU(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  CHECK_GPU(cudaEventDestroy(begin));
  CHECK_GPU(cudaEventDestroy(end));
  return static_cast<double>(times[times.size() / 2]);
}

// c (m x n, rows) = op(a) op(b), bf16, by cuBLASLt's first choice.
class Library {
 public:
  static constexpr int kStreams = 4;
  Library() : workspace_(std::size_t{kStreams} << 25) {
    check_lt(cublasLtCreate(&handle_), "cublasLtCreate");
    for (int i = 0; i < kStreams; ++i) {
      CHECK_GPU(cudaStreamCreateWithFlags(&streams_[i], cudaStreamNonBlocking));
      CHECK_GPU(cudaEventCreateWithFlags(&done_[i], cudaEventDisableTiming));
    }
    CHECK_GPU(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming));
  }
  struct Product {
    std::int64_t m, n, k;
    bool transpose_a, transpose_b;
    const bf16 *a, *b;
    bf16* c;
    bool add;
  };
  void multiply(const Product& p, cudaStream_t stream, int workspace = 0) {
    const float one = 1, old = p.add ? 1 : 0;
    cublasLtMatmulDesc_t d;
    check_lt(cublasLtMatmulDescCreate(&d, CUBLAS_COMPUTE_32F, CUDA_R_32F), "desc");
    const cublasOperation_t left = p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                            right = p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSA, &left, sizeof left);
    cublasLtMatmulDescSetAttribute(d, CUBLASLT_MATMUL_DESC_TRANSB, &right, sizeof right);
    cublasLtMatrixLayout_t lb, la, lc;
    const auto layout = [](cublasLtMatrixLayout_t* l, std::int64_t rows, std::int64_t columns) {
      check_lt(cublasLtMatrixLayoutCreate(l, CUDA_R_16BF, rows, columns, rows), "layout");
    };
    layout(&lb, p.transpose_b ? p.k : p.n, p.transpose_b ? p.n : p.k);
    layout(&la, p.transpose_a ? p.m : p.k, p.transpose_a ? p.k : p.m);
    layout(&lc, p.n, p.m);
    const cublasLtMatmulAlgo_t& algorithm = choose(p, d, lb, la, lc);
    check_lt(cublasLtMatmul(handle_, d, &one, p.b, lb, p.a, la, &old, p.c, lc, p.c, lc, &algorithm,
                            workspace_.data() + (std::size_t(workspace) << 25), std::size_t{1} << 25, stream),
             "cublasLtMatmul");
    cublasLtMatrixLayoutDestroy(lb);
    cublasLtMatrixLayoutDestroy(la);
    cublasLtMatrixLayoutDestroy(lc);
    cublasLtMatmulDescDestroy(d);
  }
  // body(expert) is each expert's product.
  template <class Body>
  void by_expert(int experts, const Body& body) {
    CHECK_GPU(cudaEventRecord(forked_));
    for (cudaStream_t s : streams_) CHECK_GPU(cudaStreamWaitEvent(s, forked_, 0));
    for (int e = 0; e < experts; ++e) multiply(body(e), streams_[e % kStreams], e % kStreams);
    for (int i = 0; i < kStreams; ++i) {
      CHECK_GPU(cudaEventRecord(done_[i], streams_[i]));
      CHECK_GPU(cudaStreamWaitEvent(nullptr, done_[i], 0));
    }
  }

 private:
  struct Choice {
    std::int64_t m, n, k;
    bool ta, tb, add;
    cublasLtMatmulAlgo_t algorithm;
  };
  const cublasLtMatmulAlgo_t& choose(const Product& p, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t lb,
                                     cublasLtMatrixLayout_t la, cublasLtMatrixLayout_t lc) {
    for (const Choice& c : choices_)
      if (c.m == p.m && c.n == p.n && c.k == p.k && c.ta == p.transpose_a && c.tb == p.transpose_b &&
          c.add == p.add)
        return c.algorithm;
    cublasLtMatmulPreference_t preference;
    check_lt(cublasLtMatmulPreferenceCreate(&preference), "preference");
    const std::size_t bytes = std::size_t{1} << 25;
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                         sizeof bytes);
    cublasLtMatmulHeuristicResult_t result{};
    int found = 0;
    check_lt(cublasLtMatmulAlgoGetHeuristic(handle_, d, lb, la, lc, lc, preference, 1, &result, &found),
             "heuristic");
    cublasLtMatmulPreferenceDestroy(preference);
    choices_.push_back({p.m, p.n, p.k, p.transpose_a, p.transpose_b, p.add, result.algo});
    return choices_.back().algorithm;
  }
  cublasLtHandle_t handle_;
  Memory<unsigned char> workspace_;
  cudaStream_t streams_[kStreams];
  cudaEvent_t done_[kStreams], forked_;
  std::vector<Choice> choices_;
};

double square_tflops(Library& library, Memory<bf16>& memory) {
  constexpr std::int64_t kN = 8192;
  bf16 *a = memory.data(), *b = a + kN * kN, *c = b + kN * kN;
  const double ms = time_of(
      [&] {
        library.multiply({kN, kN, kN, false, true, a, b, c, false}, nullptr);
      },
      15);
  return 2e-9 * kN * kN * kN / ms;
}

struct Figures {
  double square;
  int tokens;
  std::string routing;
  void line(const char* name, double flops, double ms) const {
    std::printf("%6d %-8s  %-28s %8.3f ms %7.1f TFLOP/s  %.3f of 8192^3\n", tokens, routing.c_str(), name, ms,
                flops * 1e-9 / ms, flops * 1e-9 / ms / square);
    std::printf("{\"tokens\": %d, \"routing\": \"%s\", \"kernel\": \"%s\", \"ms\": %.4f, \"tflops\": %.1f}\n",
                tokens, routing.c_str(), name, ms, flops * 1e-9 / ms);
    std::fflush(stdout);
  }
  void square_line(const char* when, double tflops) const {
    std::printf("%6d  8192^3 %s %.1f TFLOP/s\n", tokens, when, tflops);
    std::printf("{\"tokens\": %d, \"square\": \"%s\", \"tflops\": %.1f}\n", tokens, when, tflops);
    std::fflush(stdout);
  }
};

// All kernels at one number of tokens, and what cuBLASLt takes for the same products without what stands around them.
class Timings {
 public:
  Timings(int tokens, const std::string& routing)
      : e_(rows_of_experts(tokens, routing == "zipf"), kWidth, kNeurons, kChoices, 21),
        n_(static_cast<std::size_t>(e_.rows) * kNeurons),
        gate_up_(2 * n_),
        hidden_(n_),
        dgate_up_(2 * n_),
        y_(static_cast<std::size_t>(e_.rows) * kWidth),
        dw1_(e_.gate_up_weights.size()),
        dw2_(e_.down_weights.size()),
        square_(std::size_t{3} << 26),
        dweight_(n_ / 128),
        up_(4.0 * e_.rows * kWidth * kNeurons),
        down_(up_ / 2) {
    for (auto* m : {&gate_up_, &hidden_, &dgate_up_, &y_, &dw1_, &dw2_, &square_})
      Experts::random(*m, 31, 1.0f);
    figures_ = {square_tflops(library_, square_), tokens, routing};
    figures_.square_line("before", figures_.square);
  }
  ~Timings() { figures_.square_line("after", square_tflops(library_, square_)); }

  void up() {
    line("up, pairs", up_, [&] { experts_up<UpConfig<2, 4>>(e_, gate_up_.data(), hidden_.data()); });
    line("up, single", up_, [&] { experts_up<UpConfig<1, 4>>(e_, gate_up_.data(), hidden_.data()); });
    rows_by_library("up, library", up_, kWidth, 2 * kNeurons, true, y_, e_.gate_up_weights, gate_up_);
  }
  void rows() {
    line("down, pairs", down_,
         [&] { experts_rows<RowsConfig<Major::kK, 2, 4>>(e_, y_.data(), hidden_.data()); });
    line("down, single", down_,
         [&] { experts_rows<RowsConfig<Major::kK, 1, 4>>(e_, y_.data(), hidden_.data()); });
    rows_by_library("down, library", down_, kNeurons, kWidth, true, hidden_, e_.down_weights, y_);
    line("dx, pairs", up_,
         [&] { experts_rows<RowsConfig<Major::kMN, 2, 4>>(e_, y_.data(), dgate_up_.data()); });
    line("dx, single", up_,
         [&] { experts_rows<RowsConfig<Major::kMN, 1, 4>>(e_, y_.data(), dgate_up_.data()); });
    rows_by_library("dx, library", up_, 2 * kNeurons, kWidth, false, dgate_up_, e_.gate_up_weights, y_);
  }
  void dhidden() {
    const auto run = [&](auto config) {
      experts_dhidden<decltype(config)>(e_, dgate_up_.data(), hidden_.data(), dweight_.data(),
                                        gate_up_.data());
    };
    line("dhidden, pairs", down_, [&] { run(DHiddenConfig<2, 5>{}); });
    line("dhidden, single", down_, [&] { run(DHiddenConfig<1, 5>{}); });
    rows_by_library("dhidden, library", down_, kWidth, kNeurons, false, y_, e_.down_weights, hidden_);
  }
  void dweights() {
    const auto w1 = [&](auto config) {
      experts_dweights<decltype(config)>(e_, dw1_.data(), dgate_up_.data());
    };
    const auto w2 = [&](auto config) { experts_dweights<decltype(config)>(e_, dw2_.data(), hidden_.data()); };
    line("dw gate_up, pairs", up_, [&] { w1(DWeightsConfig<false, false, 2, 4>{}); });
    line("dw gate_up, single", up_, [&] { w1(DWeightsConfig<false, false, 1, 4>{}); });
    line("dw gate_up, pairs, added", up_, [&] { w1(DWeightsConfig<false, true, 2, 4>{}); });
    line("dw down, pairs", down_, [&] { w2(DWeightsConfig<true, false, 2, 4>{}); });
    line("dw down, single", down_, [&] { w2(DWeightsConfig<true, false, 1, 4>{}); });
    line("dw down, pairs, added", down_, [&] { w2(DWeightsConfig<true, true, 2, 4>{}); });
    for (bool add : {false, true}) {
      const std::string added = add ? ", added" : "";
      weights_by_library("dw gate_up, library" + added, up_, dgate_up_, y_, 2 * kNeurons, kWidth, dw1_, add);
      weights_by_library("dw down, library" + added, down_, y_, hidden_, kWidth, kNeurons, dw2_, add);
    }
  }

 private:
  static std::vector<int> rows_of_experts(int tokens, bool zipf) {
    std::vector<int> rows(kExperts);
    std::vector<double> shares(kExperts, 1.0);
    for (int e = 0; zipf && e < kExperts; ++e) shares[e] = 1.0 / (e + 1);
    std::mt19937_64 random(3);
    std::discrete_distribution<int> expert(shares.begin(), shares.end());
    for (int i = 0; i < tokens * kChoices; ++i) ++rows[expert(random)];
    return rows;
  }
  template <class Body>
  void line(const std::string& name, double flops, const Body& body) {
    figures_.line(name.c_str(), flops, time_of(body));
  }
  // out[rows of e] = in[rows of e] op(w[e]), `inner` summed over.
  void rows_by_library(const std::string& name, double flops, std::int64_t inner, std::int64_t columns,
                       bool transpose, const Memory<bf16>& in, const Memory<bf16>& w,
                       const Memory<bf16>& out) {
    line(name, flops, [&] {
      library_.by_expert(kExperts, [&](int e) {
        const std::int64_t first = e_.offsets[e], count = e_.offsets[e + 1] - first;
        return Library::Product{count,
                                columns,
                                inner,
                                false,
                                transpose,
                                in.data() + first * inner,
                                w.data() + e * inner * columns,
                                out.data() + first * columns,
                                false};
      });
    });
  }
  // dw[e] (+)= a[rows of e]^T b[rows of e].
  void weights_by_library(const std::string& name, double flops, const Memory<bf16>& a, const Memory<bf16>& b,
                          std::int64_t m, std::int64_t n, const Memory<bf16>& dw, bool add) {
    line(name, flops, [&] {
      library_.by_expert(kExperts, [&](int e) {
        const std::int64_t first = e_.offsets[e], count = e_.offsets[e + 1] - first;
        return Library::Product{
            m, n, count, true, false, a.data() + first * m, b.data() + first * n, dw.data() + e * m * n, add};
      });
    });
  }

  Experts e_;
  std::size_t n_;
  Memory<bf16> gate_up_, hidden_, dgate_up_, y_, dw1_, dw2_, square_;
  Memory<float> dweight_;
  double up_, down_;
  Library library_;
  Figures figures_{};
};

}  // namespace

int time_kernels(int tokens, const char* routing, const char* which) {
  const auto wanted = [w = std::string(which)](const char* name) { return w == "all" || w == name; };
  Timings timings(tokens, routing);
  if (wanted("up")) timings.up();
  if (wanted("rows")) timings.rows();
  if (wanted("dhidden")) timings.dhidden();
  if (wanted("dweights")) timings.dweights();
  return 0;
}

}  // namespace sm90_bench
