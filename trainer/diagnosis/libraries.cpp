#include "trainer/diagnosis/libraries.h"

#include "data/hdf5_file.h"
#include "kernels/core/gpu.h"
#include "kernels/ops/product_library.h"
#include "parallel/mpi_comm.h"
#include "parallel/nccl_comm.h"

namespace upmoe {

std::vector<std::pair<std::string, std::string>> library_versions() {
  std::vector<std::pair<std::string, std::string>> all{
      {"MPI", mpi_library()}, {"products on the CPU", ops::product_library()}, {"HDF5", hdf5_library()}};
  all.emplace_back("CUDA", gpu::is_built() ? (gpu::driver_version().empty()
                                                  ? "built in; no driver here"
                                                  : "built in; the driver is for " + gpu::driver_version())
                                           : "this program was built without it");
  for (const auto& library : gpu::libraries()) all.push_back(library);
  all.emplace_back("NCCL", nccl_library());
  return all;
}

}  // namespace upmoe
