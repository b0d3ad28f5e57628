#pragma once
// This rank's parameters: one flat buffer of values and one of gradients, in the order of the ParamTable,
// with the views that layers bind to. Each parameter has its own dtype (ParamSpec::fp32), and may have no gradient: a
// buffer, or frozen.
//
// Gradients have two faces. `grad` is what backward writes into: the whole shard. `owned_grad` is what the
// optimizer reads: the slice this rank owns, summed over ranks. With one gradient per parameter the second is
// a view of the first. With shared block gradients (ZeRO-2) all blocks write into one block's worth of memory,
// one after the other, and each owned slice has memory of its own, to which every micro-batch's sum is added.
//
// No memory of gradients is cleared. Each remembers whether it has been written in this step; its first writer writes
// over what stands there (write_grad, write_owned_grad), and what had no writer is made zero before it is read.

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "parallel/layout.h"
#include "trainer/model/param.h"

namespace upmoe {

struct StoredParam {
  ParamSpec spec;
  Box shard;        // what this rank computes with, in global coordinates
  Replica replica;  // among the ranks that hold the same shard
  Range owned;      // ZeRO: the flat part of the shard this rank updates and saves
  bool frozen = false;
  TensorView value, grad;  // shape: shard.extent; grad without shape when it does not train or is not wanted
  TensorView owned_grad;   // flat, owned.size() elements; without shape like grad
  bool shares_grad = false;  // `grad` is the memory of other blocks too
  bool *grad_written = nullptr,
       *owned_grad_written = nullptr;  // in this step; the second: where grad is shared
  bool trains() const { return spec.trained && !frozen; }
  TensorView owned_value() const {  // flat, owned.size() elements
    return value.reshape({value.elements()}).rows(owned.begin, owned.end);
  }
  Param whole() const { return {value, grad, {grad_written, 1}}; }
  // As Param::write_grad, for a sum over ranks of a gradient that is shared.
  GradientView write_owned_grad() const {
    const bool first = !std::exchange(*owned_grad_written, true);
    return {owned_grad, first ? Accumulate::kOverwrite : Accumulate::kAdd};
  }
};

// Fills `out`, on the host, with a box of a parameter, converting to out's dtype.
using ReadParam = std::function<void(const ParamSpec& spec, const Box& box, TensorView out)>;

class ParamStore {
 public:
  struct Options {
    DType dtype = DType::kF32;       // of activations, and of all that is not kept in fp32
    DType grad_dtype = DType::kF32;  // dtype, or fp32 beside bf16 values
    std::vector<Role> fp32 = {};     // kept in fp32 beside those of the table
    bool share_block_grads = false;
    Device device;
    bool gradients = true;
    std::vector<std::string> freeze;  // names of parameters that do not train
  };
  ParamStore(const ModelConfig& config, const MeshSpec& mesh, const StagePlan& plan, int rank,
             const Options& options);

  const std::vector<StoredParam>& all() const { return params_; }
  const StoredParam& at(const std::string& name) const;
  bool has(const std::string& name) const { return index_.contains(name); }
  Param param(const std::string& name, Shape shape) const;
  // Neighbours of the table as one matrix: q, k, v. All frozen or none.
  Param joined(const std::vector<std::string>& names, Shape shape) const;

  void load(Exec& ex, const ReadParam& read);
  // The ParamTable's initialisation; element values depend on (seed, name, global index) alone.
  void initialise(Exec& ex, std::int64_t seed);
  // No gradient is written yet: a step begins.
  void forget_gradients() const;
  // Zeros into the gradients of `layer` (-1: outside the blocks) that nobody wrote in this step, before they are read.
  void zero_unwritten_gradients(Exec& ex, int layer) const;
  // The memory that this block's gradients share with others is another block's now. Only with share_block_grads.
  void forget_shared_gradients(int layer) const;
  std::size_t value_bytes() const { return values_.bytes(); }
  std::size_t gradient_bytes() const { return grads_.bytes() + owned_grads_.bytes(); }
  DType compute_dtype() const { return options_.dtype; }  // of activations; a parameter says its own
  bool shares_block_grads() const { return options_.share_block_grads; }

 private:
  DType value_dtype(const ParamSpec& spec) const { return spec.fp32 ? DType::kF32 : options_.dtype; }
  DType grad_dtype(const ParamSpec& spec) const { return spec.fp32 ? DType::kF32 : options_.grad_dtype; }
  void bind_values();
  void choose_sharing();
  void bind_gradients();
  void bind_marks();

  Options options_;
  Buffer values_, grads_, owned_grads_;
  std::vector<StoredParam> params_;
  std::unique_ptr<bool[]> written_;  // what grad_written and owned_grad_written of all of them point to
  std::map<std::string, std::size_t> index_;
};

// The initial value of a box of a parameter, on the host: what initialise() writes.
void initial_values(const ParamSpec& spec, std::int64_t seed, const Box& box, TensorView out);

}  // namespace upmoe
