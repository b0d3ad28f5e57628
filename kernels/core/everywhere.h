#pragma once
// A function of the host and, where a CUDA compiler reads it, of the device.

#ifdef __CUDACC__
#define UPMOE_EVERYWHERE __host__ __device__
#else
#define UPMOE_EVERYWHERE
#endif
