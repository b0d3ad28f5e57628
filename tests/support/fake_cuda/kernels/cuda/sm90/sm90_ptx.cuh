#pragma once
// Found before the file of the same name that holds inline assembly: Hopper's instructions on the CPU.
#include "tests/support/fake_cuda/sm90_emulation.h"
