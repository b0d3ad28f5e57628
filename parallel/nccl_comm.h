#pragma once
// Transfers between GPUs.

#include "parallel/communicator.h"

namespace upmoe {

// Tensors on the host go through `host`, tensors on a GPU over NCCL between the ranks' current GPUs: verbs
// take the stream that the tensors are computed on (never null), return at once, and Pending::wait() holds
// that stream, not the host. Each group has a stream of its own, and so has each route of connect(), along
// which alone messages can be sent. Unless the environment says otherwise (NCCL_LAUNCH_ORDER_IMPLICIT), operations
// of all groups begin in the order in which this rank's thread gave them. An error of NCCL that no call returns
// ends the process with kCommunicator; a verb past the watchdog's deadline does too. Collective over `host`. A
// build without NCCL, or with one older than 2.26, throws Error(kDevice).
std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> host);

std::string nccl_library();  // its version

// For tests: called in place of ending the process, with the message, from another thread.
void set_nccl_error_handler(std::function<void(const std::string&)> handler);

}  // namespace upmoe
