#pragma once
// The same few steps of a golden model under any mesh, with everything the ranks hold put together again, so
// that two meshes can be compared.

#include <unistd.h>

#include <functional>
#include <mutex>
#include <numeric>
#include <optional>

#include "configs/run_problems.h"
#include "kernels/core/philox.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"
#include "parallel/nccl_comm.h"
#include "parallel/thread_comm.h"
#include "tests/support/drawn.h"
#include "tests/support/golden.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/test_device.h"
#include "trainer/trainer.h"

namespace upmoe::test {

// kSome: of four sequences one has no target that counts, one only in its first half, the others one in three. kAll,
// kNothing: a mask as well.
enum class LossMask { kNone, kSome, kAll, kNothing };

// Of each token of a file, as a target: the first one of a sequence is the second token.
inline std::vector<std::uint8_t> make_loss_mask(LossMask kind, const Golden& golden) {
  if (kind == LossMask::kNone) return {};
  std::vector<std::uint8_t> mask(golden.stream_size(), kind == LossMask::kAll ? 1 : 0);
  if (kind != LossMask::kSome) return mask;
  const auto length = static_cast<std::size_t>(golden.seq_len());
  for (std::size_t target = 0; target + 1 < mask.size(); ++target) {
    const std::size_t sequence = target / length % 4, place = target % length;
    const bool counts = sequence == 2 ? place < length / 2 : sequence != 1 && target % 3 == 0;
    mask[target + 1] = counts ? 1 : 0;
  }
  return mask;
}

struct Layout {
  std::string model;
  MeshSpec mesh;
  std::int64_t micro_batch = 1;
  int pp_chunks = 1;
  Recompute recompute = Recompute::kNone;
  Precision precision = Precision::kFp32;
  bool mask_documents = false;
  double z_loss = 0, aux_loss = -1;  // below 0: the golden file's
  std::vector<AuxKind> aux_kinds = {AuxKind::kHf};
  int aux_groups = 1;
  std::int64_t steps = 5;
  int node_ranks = 0;
  int zero = 1;
  Precision reduce = Precision::kFp32;
  OptimizerKind optimizer = OptimizerKind::kAdamW;
  std::uint64_t order_seed = 0;  // of the neurons
  RouterDType router = RouterDType::kAuto;
  bool router_bias = false;  // the model has a buffer
  ExpertsPath experts = ExpertsPath::kAuto;
  // 0: the golden file's. Else a model of this width and half as many neurons of each of six experts, with weights
  // drawn at random, on the file's tokens.
  std::int64_t width = 0;
  int num_experts = 0;  // 0: as many as there are; else so many in each mixture, with weights drawn at random
  std::optional<RouterForm> form = {};  // empty: the model's own
  int choices = 0;                      // experts of a token; 0: as many as the golden file says
  bool renormalize = false;             // their weights, whatever the golden file says
  double bias_rate = 0;
  double eps = 0;  // AdamW's; 0: the golden file's
  LossMask loss_mask = LossMask::kNone;
  std::vector<std::string> freeze = {};
  LoraForm lora = {};
  std::function<void(RunConfig&)> change = {};  // of what nothing above says; not for one_rank()

  RouterForm own_form() const { return form.value_or(RouterForm{}); }
  RouterForm& with_form() { return form ? *form : form.emplace(); }
  std::string str() const {
    const MeshSpec& m = mesh;
    return fmt::format("{}{}_pp{}x{}_dp{}_cp{}_tp{}_ep{}_etp{}_micro{}", model,
                       num_experts > 0 ? fmt::format("_e{}", num_experts) : "", m.pp, pp_chunks, m.dp, m.cp,
                       m.tp, m.ep, m.etp, micro_batch);
  }
};

using Tensors = std::map<std::string, std::vector<float>>;  // whole ones, by name

struct Outcome {
  std::vector<double> losses, auxes, zs, norms, dropped, distilled;
  std::vector<std::vector<std::vector<double>>> loads;
  Tensors gradients, weights, buffers;  // gradients of the first step
};

inline RunConfig run_of(const Layout& l, const Golden& golden, const std::filesystem::path& tokens) {
  RunConfig run = golden.settings(tokens, l.micro_batch, l.mesh.ep);
  run.parallel.tp = l.mesh.tp;
  run.parallel.pp = l.mesh.pp;
  run.parallel.cp = l.mesh.cp;
  run.parallel.etp = l.mesh.etp;
  run.parallel.pp_chunks = l.pp_chunks;
  run.parallel.node_ranks = l.node_ranks;
  run.parallel.zero = l.zero;
  run.parallel.reduce = l.reduce;
  run.optimizer.name = l.optimizer;
  run.freeze = l.freeze;
  static_cast<LoraForm&>(run.lora) = l.lora;
  run.train.recompute = l.recompute;
  run.train.precision = l.precision;
  run.data.mask_documents = l.mask_documents;
  run.data.train.front().loss_mask = l.loss_mask != LossMask::kNone;
  run.router.z_loss = l.z_loss;
  if (l.aux_loss >= 0) run.router.aux_loss = {l.aux_loss};
  run.router.aux_kind = l.aux_kinds;
  run.router.aux_loss.resize(l.aux_kinds.size(), run.router.aux_loss.front());
  run.router.aux_groups = l.aux_groups;
  run.router.dtype = l.router;
  run.kernels.experts = l.experts;
  run.router.bias_rate = l.bias_rate;
  if (l.eps > 0) run.optimizer.eps = l.eps;
  if (l.change) l.change(run);
  return run;
}

inline ModelConfig config_of(const Layout& l, const Golden& golden) {
  ModelConfig config = golden.config();
  config.router_bias = config.router_bias || l.router_bias || l.bias_rate > 0;
  config.router = l.form.value_or(config.router);
  config.lora = l.lora;
  if (l.choices > 0) config.num_experts_per_tok = l.choices;
  config.norm_topk_prob = config.norm_topk_prob || l.renormalize;
  config.router_load = run_of(l, golden, "unused").router.has_term(AuxKind::kGlobal);
  if (l.width > 0) {
    config.head_dim = config.head_dim > 0 ? config.head_dim : l.width / config.num_attention_heads;
    config.hidden_size = l.width;
    config.moe_intermediate_size = l.width / 2;
    config.num_experts = 6;
    config.num_experts_per_tok = 2;
  }
  if (l.num_experts > 0) {
    config.num_experts = l.num_experts;
    config.num_experts_per_tok = std::min(config.num_experts_per_tok, l.num_experts);
  }
  return config;
}

inline bool is_possible(const Layout& l, const Golden& golden) {
  return problems_of(run_of(l, golden, "unused"), config_of(l, golden), l.mesh.world()).empty();
}

// Every mesh of `ranks` ranks that the model allows.
inline std::vector<Layout> meshes(const std::string& model, int ranks) {
  const Golden golden(model);
  std::vector<Layout> all;
  for (int pp = 1; pp <= ranks; ++pp)
    for (int cp = 1; cp <= ranks; ++cp)
      for (int tp = 1; tp <= ranks; ++tp) {
        if (ranks % (pp * cp * tp) != 0) continue;
        const MeshSpec dense{pp, ranks / (pp * cp * tp), cp, tp, 1, 1};
        for (int ep = 1; ep <= ranks; ++ep)
          for (int etp = 1; etp <= ranks; ++etp)
            for (int chunks : {1, 2}) {
              Layout l{model, dense, 1, chunks};
              l.mesh.ep = ep;
              l.mesh.etp = etp;
              if (is_possible(l, golden)) all.push_back(l);
            }
      }
  return all;
}

// One of every kind of layout: each axis alone, some together, chunks, nodes, ZeRO-2 and recomputation.
inline std::vector<Layout> layouts_of_every_kind() {
  const auto of = [](MeshSpec mesh) { return Layout{"moe_a27b", mesh, 1}; };
  std::vector<Layout> all{of({1, 2, 1, 1, 1, 1}), of({1, 2, 1, 1, 2, 1}), of({1, 1, 1, 2, 1, 1}),
                          of({1, 1, 2, 1, 1, 1}), of({2, 1, 1, 1, 1, 1}), of({1, 2, 1, 1, 1, 2}),
                          of({1, 4, 1, 1, 4, 1}), of({2, 1, 2, 2, 2, 1}), of({1, 2, 2, 2, 4, 1})};
  all[4].model = "moe_mixed";
  all[4].pp_chunks = 2;
  all[6].node_ranks = 2;
  all.push_back(of({1, 2, 1, 1, 2, 1}));
  all.back().zero = 2;
  all.push_back(of({1, 2, 1, 2, 2, 1}));
  all.back().recompute = Recompute::kBlock;
  all.push_back(of({2, 1, 1, 2, 1, 1}));
  all.back().recompute = Recompute::kNorms;
  return all;
}

// A shuffled 0..n-1; as it is for seed 0.
inline std::vector<std::int64_t> permutation(std::int64_t n, std::uint64_t seed) {
  if (seed != 0) return shuffled(n, seed);
  std::vector<std::int64_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// What tests have in a buffer, or in what training adds: needs all bits of fp32, and every element has its own.
inline float in_buffer(std::int64_t at) {
  return 1.0f / static_cast<float>(3 + at);
}

// Fills a ParamStore of any dtype with a golden file's weights. A seed shuffles the neurons of every
// feed-forward network: the same function, with its sums in another order.
inline ReadParam golden_weights(const Golden& golden, std::uint64_t order_seed = 0) {
  return [&golden, order_seed](const ParamSpec& spec, const Box& box, TensorView out) {
    std::vector<float> all(static_cast<std::size_t>(spec.shape.elements())), mine;
    golden.reader()(spec, whole(spec.shape), host_view(all.data(), spec.shape));
    const bool not_in_file = hf_tensors_of(golden.config(), spec).empty();
    for (std::size_t i = 0; not_in_file && i < all.size(); ++i)
      all[i] = in_buffer(static_cast<std::int64_t>(i));
    std::int64_t width = 1, stride = 1;  // of one neuron; without neurons nothing moves
    for (int d = spec.shape.rank - 1; d >= 0 && width == 1; --d) {
      if (spec.dims[static_cast<std::size_t>(d)] == Dim::kFfn) width = spec.shape[d];
      if (width == 1) stride *= spec.shape[d];
    }
    const std::vector<std::int64_t> order = permutation(width, order_seed);
    Golden::for_each_index(box, spec.shape, [&](std::int64_t at) {
      const std::int64_t neuron = at / stride % width;
      mine.push_back(
          all[static_cast<std::size_t>(at + (order[static_cast<std::size_t>(neuron)] - neuron) * stride)]);
    });
    Exec host;
    ops::cast(host, out, host_view(static_cast<const float*>(mine.data()), box.extent));
  };
}

// Every element by the parameter's name and its own place, around 1 where a parameter has one dimension.
inline ReadParam drawn_weights() {
  return [](const ParamSpec& spec, const Box& box, TensorView out) {
    const std::uint64_t key = philox_key(17, spec.name);
    const float middle = spec.shape.rank == 1 ? 1.0f : 0.0f;
    std::vector<float> mine;
    Golden::for_each_index(box, spec.shape, [&](std::int64_t at) {
      mine.push_back(middle +
                     0.2f * (uniform_from_bits(philox(key, static_cast<std::uint64_t>(at))[0]) - 0.5f));
    });
    Exec host;
    ops::cast(host, out, host_view(static_cast<const float*>(mine.data()), box.extent));
  };
}

inline ReadParam weights_of(const Layout& l, const Golden& golden) {
  return l.width > 0 || l.num_experts > 0 ? drawn_weights() : golden_weights(golden, l.order_seed);
}

// Four ranks and three experts: rank 0 has none.
inline Layout of_three_experts(const MeshSpec& mesh) {
  Layout l{"moe_mixed", mesh, 1};
  l.num_experts = 3;
  l.choices = 2;
  return l;
}

// Puts the slice that this rank owns of a parameter, or of something shaped like it, where it belongs.
inline void place(Exec& ex, Tensors& all, const std::string& name, const StoredParam& p,
                  ConstTensorView on_device) {
  const Buffer memory = Buffer::allocate({}, on_device.bytes());
  const TensorView owned = memory.view(on_device.shape, on_device.dtype);
  ops::download(ex, owned, on_device);
  std::vector<float>& whole = all[name];
  whole.resize(static_cast<std::size_t>(p.spec.shape.elements()));
  std::int64_t i = 0;
  for (const Box& box : flat_range_to_boxes(p.shard, p.owned))
    Golden::for_each_index(box, p.spec.shape, [&](std::int64_t at) {
      whole[static_cast<std::size_t>(at)] =
          owned.dtype == DType::kF32 ? owned.as<float>()[i] : to_float(owned.as<bf16>()[i]);
      ++i;
    });
}

// Runs this rank's part; what it owns goes into `outcome`.
// `prepare` sees the session before it begins, `after` when all ranks have their weights.
inline void run_rank(Communicator& world, const Golden& golden, const Layout& layout, Outcome& outcome,
                     std::mutex& mutex, const std::function<void(Session&)>& prepare = {},
                     const std::function<void(Session&)>& after = {}) {
  const TemporaryDirectory folder;
  const std::filesystem::path tokens = folder.path() / "tokens.h5";
  golden.write_tokens(tokens, make_loss_mask(layout.loss_mask, golden));
  const RunConfig run = run_of(layout, golden, tokens);
  const std::vector<std::string> problems = problems_of(run, config_of(layout, golden), world.size());
  UPMOE_CHECK(problems.empty(), "{}", problems.front());
  Device device;
  std::unique_ptr<Communicator> gpus;
  if (on_gpu()) {
    device = {DeviceType::kCuda, world.rank()};
    gpu::use(world.rank());
    gpus = make_nccl_communicator(world.split(0, world.rank()));
  }
  Session s(run, config_of(layout, golden), gpus != nullptr ? *gpus : world, device);
  if (prepare) prepare(s);
  s.params.load(s.memory.exec, weights_of(layout, golden));
  s.optimizer.reset(s.memory.exec);
  s.open_data(0);
  Trainer trainer(s);
  for (std::int64_t step = 1; step <= layout.steps; ++step) {
    const StepReport r = trainer.step(step);
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) {
      outcome.losses.push_back(r.loss);
      outcome.auxes.push_back(r.aux_loss);
      outcome.zs.push_back(r.z_loss);
      outcome.norms.push_back(r.grad_norm);
      outcome.loads.push_back(r.expert_load);
      outcome.dropped.push_back(r.dropped);
      outcome.distilled.push_back(r.distill_loss);
    }
    if (step > 1) continue;
    for (const StoredParam& p : s.params.all())
      if (p.trains() && p.owned.size() > 0)
        place(s.memory.exec, outcome.gradients, p.spec.name, p, p.owned_grad);
  }
  trainer.settle();
  // On a GPU this rank may be far ahead of the others, whose part its own work waits for: not with the lock.
  if (s.memory.stream != nullptr) s.memory.stream->synchronize();
  const std::lock_guard lock(mutex);
  for (const OwnedSlice& slice : s.optimizer.slices())
    place(s.memory.exec, outcome.weights, slice.param->spec.name, *slice.param, slice.weight);
  for (const StoredParam& p : s.params.all())
    if (!p.spec.trained && p.owned.size() > 0)
      place(s.memory.exec, outcome.buffers, p.spec.name, p, p.owned_value());
  if (after) after(s);
}

// `prepare` as of run_rank().
inline Outcome run_in_layout(const Layout& layout, const std::function<void(Session&)>& prepare = {}) {
  const Golden golden(layout.model);
  Outcome outcome;
  std::mutex mutex;
  run_in_threads(layout.mesh.world(),
                 [&](Communicator& world) { run_rank(world, golden, layout, outcome, mutex, prepare); });
  return outcome;
}

}  // namespace upmoe::test
