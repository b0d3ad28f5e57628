#pragma once
// The choice for a description, written down where somebody asks.

#include "kernels/core/log.h"
#include "kernels/cuda/choose/gpu.h"

namespace upmoe::cuda {

// UPMOE_SHOW_KERNELS=1 in the environment: every description with its choice goes to the log, once.
bool shows_kernels();

template <class Description>
auto chosen(const Description& d, const Gpu& gpu) {
  auto choice = choose(d, gpu);
  if (shows_kernels()) log::info_once("sm_{}: {}: {}", gpu.sm, words_of(d), words_of(choice));
  return choice;
}

}  // namespace upmoe::cuda
