#pragma once
// As much of cuDNN and of its frontend's graphs as attention uses: a graph remembers its tensors and computes
// from their dims and strides, element by element. What the real headers say of these names holds here too;
// what is not here fails to compile.

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "tests/support/fake_cuda/cuda_runtime.h"

enum cudnnStatus_t { CUDNN_STATUS_SUCCESS = 0, CUDNN_STATUS_NOT_INITIALIZED = 1001 };
using cudnnHandle_t = struct FakeCudnn*;
std::size_t cudnnGetVersion();
const char* cudnnGetErrorString(cudnnStatus_t status);
cudnnStatus_t cudnnCreate(cudnnHandle_t* handle);
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle);
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream);

namespace cudnn_frontend {

enum class DataType_t { FLOAT, BFLOAT16, INT32 };
enum class HeurMode_t { A };

struct error_t {
  bool good = true;
  std::string message;
  bool is_good() const { return good; }
  std::string get_message() { return message; }
};

namespace graph {

class Tensor_attributes {
 public:
  Tensor_attributes& set_name(const std::string&) { return *this; }
  Tensor_attributes& set_uid(std::int64_t value) { return uid = value, *this; }
  Tensor_attributes& set_data_type(DataType_t value) { return type = value, *this; }
  Tensor_attributes& set_dim(const std::vector<std::int64_t>& value) { return dim = value, *this; }
  Tensor_attributes& set_stride(const std::vector<std::int64_t>& value) { return stride = value, *this; }
  Tensor_attributes& set_output(bool value) { return output = value, *this; }
  // Where each of dim[0] sequences begins, in elements.
  Tensor_attributes& set_ragged_offset(const std::shared_ptr<Tensor_attributes>& value) {
    return offset = value, *this;
  }

  std::int64_t uid = 0;
  DataType_t type = DataType_t::FLOAT;
  std::vector<std::int64_t> dim, stride;
  bool output = false;
  std::shared_ptr<Tensor_attributes> offset;
};
using Tensor = std::shared_ptr<Tensor_attributes>;

template <class Self>
class Attention_attributes {
 public:
  Self& set_name(const std::string&) { return self(); }
  Self& set_causal_mask(bool value) { return causal = value, self(); }
  Self& set_attn_scale(float value) { return scale = value, self(); }
  Self& set_diagonal_band_left_bound(int value) { return left_bound = value, self(); }
  Self& set_padding_mask(bool value) { return padded = value, self(); }
  Self& set_seq_len_q(const Tensor& value) { return size_q = value, self(); }
  Self& set_seq_len_kv(const Tensor& value) { return size_kv = value, self(); }
  bool padded = false;  // sequences end where size_q and size_kv say
  Tensor size_q, size_kv;
  bool causal = false;
  int left_bound = 0;  // 0: not set; else column + left_bound > row is kept
  float scale = 1;

 private:
  Self& self() { return static_cast<Self&>(*this); }
};
class SDPA_attributes : public Attention_attributes<SDPA_attributes> {
 public:
  SDPA_attributes& set_generate_stats(bool value) { return stats = value, *this; }
  bool stats = false;
};
class SDPA_backward_attributes : public Attention_attributes<SDPA_backward_attributes> {
 public:
  SDPA_backward_attributes& set_deterministic_algorithm(bool value) { return deterministic = value, *this; }
  bool deterministic = false;
};

class Graph {
 public:
  Graph& set_io_data_type(DataType_t) { return *this; }
  Graph& set_intermediate_data_type(DataType_t) { return *this; }
  Graph& set_compute_data_type(DataType_t) { return *this; }
  Tensor tensor(const Tensor_attributes& t) { return std::make_shared<Tensor_attributes>(t); }
  std::array<Tensor, 2> sdpa(Tensor q, Tensor k, Tensor v, SDPA_attributes options);
  std::array<Tensor, 3> sdpa_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor d_o, Tensor stats,
                                      SDPA_backward_attributes options);
  Graph& set_sm_version(int) { return *this; }
  error_t validate();
  error_t build(cudnnHandle_t handle, const std::vector<HeurMode_t>& modes);
  error_t get_workspace_size(std::int64_t& bytes);
  error_t execute(cudnnHandle_t handle, std::unordered_map<std::int64_t, void*>& memory, void* workspace);

 private:
  template <class Options>
  void take(const Options& options);
  error_t validate_sizes();

  std::map<std::string, Tensor> tensors_;
  Tensor size_q_, size_kv_;
  bool padded_ = false;
  bool backward_ = false, causal_ = false, deterministic_ = false, built_ = false;
  int left_bound_ = 0;
  float scale_ = 1;
  std::int64_t workspace_ = 0;
};

}  // namespace graph

}  // namespace cudnn_frontend
