// Each wrapper of an instruction on the GPU, by the cases that the model of the hardware is tested with.

#include "tests/bench/sm90/gpu.cuh"
#include "tests/kernels/sm90_instructions_cases.h"

namespace sm90_bench {

namespace {

struct Gpu {
  template <class T>
  using Buffer = Memory<T>;
  template <class... Parameters, class... Arguments>
  static void run(void (*kernel)(Parameters...), int blocks, int threads, std::size_t shared_bytes,
                  int cluster, const Arguments&... arguments) {
    launch(kernel, blocks, threads, shared_bytes, cluster, arguments...);
    CHECK_GPU(cudaDeviceSynchronize());
  }
};

}  // namespace

int check_instructions() {
  int failures = 0;
  upmoe::cuda::sm90::InstructionCases<Gpu>::each([&](const char* name, const std::string& wrong) {
    failures += !wrong.empty();
    std::printf("{\"instruction\": \"%s\", \"right\": %s}\n", name, wrong.empty() ? "true" : "false");
    std::printf("%s  %s%s%s\n", wrong.empty() ? "ok  " : "WRONG", name, wrong.empty() ? "" : ": ",
                wrong.c_str());
    std::fflush(stdout);
  });
  return failures != 0;
}

}  // namespace sm90_bench
