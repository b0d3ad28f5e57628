// A build without NCCL.

#include "parallel/nccl_comm.h"

namespace upmoe {

std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator>) {
  fail(ExitCode::kDevice,
       "several ranks on GPUs need NCCL, and this program was built without it: install NCCL beside the CUDA "
       "toolkit and build again, start one rank, or use device: cpu");
}

std::string nccl_library() {
  return "this program was built without it";
}

}  // namespace upmoe
