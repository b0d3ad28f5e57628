#pragma once
// The experts' kernels as functions of the host, each in a source of its own, in the variants that are compiled;
// another one is an exception with words. They enqueue and return. Rows R > 0; bf16; D a multiple of kWidthTile, F of
// kNeuronTile, at most kMostExperts experts, addresses of 16 bytes.

#include <cuda_runtime.h>

#include "kernels/core/bf16.h"
#include "kernels/core/expert_variant.h"

namespace upmoe::cuda::sm90 {

// All their tiles divide these (experts_launch.cuh), and ops/expert_shape.h says the same of them (cuda/experts.cpp).
constexpr int kWidthTile = 256, kNeuronTile = 128;
constexpr int kMostExperts = 256;  // rows of their tables in shared memory

struct ExpertsLaunch {
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;
  const int* offset_e1 = nullptr;
  int experts = 0, rows = 0;
  ExpertVariant variant;
};

struct UpOperands {
  const bf16 *x_TD, *w_eGD;
  const int* token_R;
  const float* weight_R;
  int width, neurons;
};
void experts_up(const ExpertsLaunch& l, bf16* gate_up_RG, bf16* h_RF, const UpOperands& o);

// out [R, columns] = in [R, inner] w^T, w [e, columns, inner], or in w, w [e, inner, columns].
struct RowsOperands {
  const bf16 *in, *w;
  int inner, columns;
  bool transposed;
};
void experts_rows(const ExpertsLaunch& l, bf16* out, const RowsOperands& o);

struct DHiddenOperands {
  const bf16 *dy_TD, *gate_up_RG, *w_eDF;
  const int* token_R;
  const float* weight_R;
  int width, neurons;
};
constexpr int kDWeightNeurons = 128;  // of a part of the weights' gradients
struct DHiddenResults {
  bf16 *dgate_up_RG, *h_RF;
  float* dweight_RP;  // [R, F / 128]
};
void experts_dhidden(const ExpertsLaunch& l, const DHiddenResults& r, const DHiddenOperands& o);

// dw [e, Y, X] (+)= y^T x[tokens], or its transpose [e, X, Y].
struct DWeightsOperands {
  const bf16 *y_RY, *x_TX;
  const int *token_R, *ranking_e;
  int columns_y, columns_x;
  bool transposed, add;
};
void experts_dweights(const ExpertsLaunch& l, bf16* dw, const DWeightsOperands& o);

}  // namespace upmoe::cuda::sm90
