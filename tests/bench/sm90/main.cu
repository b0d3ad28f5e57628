// usage: sm90_bench instructions | cross_entropy | kernels WHICH | time TOKENS ROUTING WHICH
// ROUTING: balanced, zipf. WHICH: all, up, rows, dhidden, dweights; of `kernels` also up_pairs, up_single and so on

#include <cstring>

#include "tests/bench/sm90/gpu.cuh"

int main(int argc, char** argv) {
  using namespace sm90_bench;
  if (argc == 2 && std::strcmp(argv[1], "instructions") == 0) return check_instructions();
  if (argc == 2 && std::strcmp(argv[1], "cross_entropy") == 0) return check_cross_entropy();
  if (argc == 3 && std::strcmp(argv[1], "kernels") == 0) return check_kernels(argv[2]);
  if (argc == 5 && std::strcmp(argv[1], "time") == 0 &&
      (std::strcmp(argv[3], "balanced") == 0 || std::strcmp(argv[3], "zipf") == 0))
    return time_kernels(std::atoi(argv[2]), argv[3], argv[4]);
  std::fprintf(
      stderr, "usage: sm90_bench instructions | cross_entropy | kernels WHICH | time TOKENS ROUTING WHICH\n");
  return 2;
}
