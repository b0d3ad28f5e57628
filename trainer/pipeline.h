#pragma once
// Runs the micro-batches of one step through this rank's chunks of the model, in the order of
// pipeline_schedule.h. One stage is the same loop: forward, backward, next. Activations of a micro-batch live
// from its forward to its backward in an arena of their own, which the next one takes over.
//
// Between stages travel, forward: the residual stream and the pool of the balance terms so far; backward: the
// stream's gradient and the whole pool. Sends do not block; receives wait.
//
// What a step adds up is added on the device; the host reads it once, when all micro-batches have been given to it.

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "data/batch_source.h"
#include "parallel/stage_plan.h"
#include "trainer/model/context_shards.h"
#include "trainer/model/transformer.h"
#include "trainer/pipeline_schedule.h"

namespace upmoe {

// Of addresses, for one arena; memory is taken as it is used. A GPU has less memory than that.
constexpr std::size_t arena_address_space(Device device) {
  return std::size_t{device.type == DeviceType::kCuda ? 256u : 64u} << 30;
}

// What this rank adds up over the micro-batches of a step; every value is counted on one rank alone.
struct StepSums {
  double loss = 0, z = 0;
  double divergence = 0;                      // from the teacher
  std::vector<double> aux;                    // of each balance term
  std::vector<std::vector<double>> assigned;  // per MoE layer of the whole model, and expert
  double lost = 0;                            // assignments of all layers that no expert took
};

class Pipeline {
 public:
  // Collective over the stages: makes the two groups that activations and gradients travel in. The chunks
  // stay the caller's and outlive the pipeline.
  Pipeline(const ModelConfig& config, const ProcessMesh& mesh, const StagePlan& plan,
           const std::vector<Transformer>& chunks, Device device);
  ~Pipeline();

  struct Step {
    BatchSource& batches;  // of this data-parallel rank; rounds() of them are taken
    double loss_scale = 1;
    // A whole model, which learns nothing, in a mesh with the same dp, cp and tp; null: none. One stage alone.
    const Transformer* teacher = nullptr;
    Distillation distillation = {};
    BalanceConfig balance = {};
    std::uint64_t seed = 0,
                  first_token = 0;  // of what routers draw: the step's first token's number in the run
    // This block is about to run; -1: what lies outside the blocks.
    std::function<void(int)> before_block = {};
    // A micro-batch's gradients of this block are added (-1: of what lies outside the blocks, once per step);
    // `last`: those of the whole step.
    std::function<void(int block, bool last)> block_done = {};
  };
  StepSums run(Exec& ex, const Step& step);

  // Sum of the cross-entropies of one micro-batch over the whole model, forward alone; counted on tp rank 0
  // of the last stage, 0 elsewhere. Collective over the stages.
  double evaluate(Exec& ex, const Batch& batch, const LmHead::Sink& sink = {},
                  const Transformer::SeeRouting& routing = {});

  std::size_t peak_bytes() const;  // of activations, all micro-batches under way together

 private:
  struct Shard;                     // this rank's tokens of one micro-batch
  struct Flight;                    // one micro-batch in one chunk, between forward and backward
  struct Link;                      // to the neighbour stages
  struct Totals;                    // of a step, on the device
  using Key = std::pair<int, int>;  // micro-batch, chunk

  // step: what routers count and draw; none outside training. Groups of tokens are there as well.
  std::unique_ptr<Shard> cut(Exec& ex, const Batch& batch, const Step* step);
  std::unique_ptr<Flight> take_flight();
  void forward(Exec& ex, const Step& step, const PipelineAction& action, const Totals& totals);
  void backward(Exec& ex, const Step& step, const PipelineAction& action, const Totals& totals);
  void pool_loads(Exec& ex, const Transformer& chunk, Flight& flight, const Totals& totals) const;
  // The micro-batch with what the teacher says of it, in memory of `keep`.
  MicroBatch taught(Exec& ex, const Step& step, const MicroBatch& batch, Arena& keep) const;
  Totals take_totals(Exec& ex, std::size_t terms, bool taught);
  StepSums read_totals(Exec& ex, const Totals& totals) const;
  std::size_t global_chunk(int chunk) const {
    return static_cast<std::size_t>(chunk * plan_.stages + stage_);
  }

  const std::vector<Transformer>& chunks_;
  StagePlan plan_;
  int stage_ = 0;
  bool counts_ = false;            // the one of the ranks that share a micro-batch that books common values
  std::vector<int> moe_of_block_;  // which mixture a block is, or -1
  std::int64_t num_experts_ = 0;
  std::int64_t mixtures_ = 0;  // of the whole model
  bool routers_know_tokens_ = false;
  std::int64_t group_size_ = 0;  // of tokens that are routed together; 0: each by itself
  ContextShards context_;
  Device device_;
  Buffer totals_;
  std::unique_ptr<Link> link_;
  std::vector<std::unique_ptr<Flight>> idle_;
  std::map<Key, std::unique_ptr<Flight>> under_way_;
  std::map<int, std::unique_ptr<Shard>> shards_;  // by micro-batch
  std::vector<std::unique_ptr<Shard>> idle_shards_;
};

}  // namespace upmoe
