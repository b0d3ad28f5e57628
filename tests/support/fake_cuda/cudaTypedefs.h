#pragma once
// Types of the driver's functions that are asked for by name. See cuda.h.

#include "tests/support/fake_cuda/cuda.h"

using PFN_cuTensorMapEncodeTiled_v12000 = decltype(&cuTensorMapEncodeTiled);
