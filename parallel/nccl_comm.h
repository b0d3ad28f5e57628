#pragma once
// Transfers between GPUs.

#include "parallel/communicator.h"

namespace upmoe {

// Tensors on the host go through `host`, tensors on a GPU over NCCL between the ranks' current GPUs.
// Collective over `host`. A build without NCCL throws Error(kDevice).
std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> host);

}  // namespace upmoe
