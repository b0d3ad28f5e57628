// The driver's functions by name, on pretended GPUs; fake_memory.cpp adds its own.

#include "tests/support/fake_cuda/cuda.h"

std::map<std::string, void*>& fake_cuda::entry_points() {
  static std::map<std::string, void*> functions{
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&cuTensorMapEncodeTiled)}};
  return functions;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* found) {
  const auto& functions = fake_cuda::entry_points();
  const auto it = functions.find(symbol);
  *function = it != functions.end() ? it->second : nullptr;
  *found = it != functions.end() ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
