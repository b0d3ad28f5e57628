// Training steps of Qwen1.5-MoE-A2.7B's shape, of fewer of its layers, or of any model that a config.json describes,
// from random weights on random tokens: one line of JSON for each step, and one for the memory. Writes no
// checkpoint. One rank; mpirun is for `upmoe train`. --profile: the last step is run once more, and its time is
// shared out among its ops.

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <map>
#include <random>

#include "configs/run_problems.h"
#include "kernels/core/gpu.h"
#include "launch/command_line.h"
#include "parallel/runtime.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/token_file_writer.h"
#include "trainer/trainer.h"

namespace {

using namespace upmoe;

struct Options {
  int layers = 24, experts = 60, steps = 5, micro_batches = 1;
  std::int64_t tokens = 16384, seq_len = 2048, width = 2048, heads = 16, expert_width = 1408,
               shared_width = 5632, vocab = 151936;
  OptimizerKind optimizer = OptimizerKind::kAdamW8bit;
  Precision precision = Precision::kBf16, reduce = Precision::kBf16;
  Recompute recompute = Recompute::kNone;
  RunConfig::Kernels kernels;
  DeviceChoice device = DeviceChoice::kAuto;
  bool offload = false, profile = false;
  std::filesystem::path model;  // empty: of the shape that the options above describe
};

Options parse(int argc, char** argv) {
  Options o;
  CLI::App app("Training steps of Qwen1.5-MoE-A2.7B's shape");
  app.option_defaults()->always_capture_default();
  auto* model = app.add_option("--model", o.model, "a folder with a config.json, instead of the shape below");
  std::vector<CLI::Option*> shape;
  shape.push_back(app.add_option("--layers", o.layers));
  shape.push_back(app.add_option("--experts", o.experts));
  app.add_option("--steps", o.steps, "the first one or two also choose algorithms and take memory");
  app.add_option("--tokens", o.tokens, "of a micro-batch");
  app.add_option("--micro-batches", o.micro_batches, "of a step")->check(CLI::Range(1, 1024));
  app.add_option("--seq-len", o.seq_len);
  shape.push_back(app.add_option("--width", o.width));
  shape.push_back(app.add_option("--heads", o.heads));
  shape.push_back(app.add_option("--expert-width", o.expert_width));
  shape.push_back(app.add_option("--shared-width", o.shared_width));
  shape.push_back(app.add_option("--vocab", o.vocab));
  add_choice(app, "--optimizer", o.optimizer, "");
  add_choice(app, "--precision", o.precision, "");
  add_choice(app, "--reduce", o.reduce, "dtype of the gradients; of fp32 weights always fp32");
  add_choice(app, "--recompute", o.recompute, "");
  add_choice(app, "--kernels-experts", o.kernels.experts, "");
  add_choice(app, "--kernels-cross-entropy", o.kernels.cross_entropy, "");
  for (CLI::Option* option : shape) option->excludes(model);
  app.add_flag("--offload", o.offload, "optimizer state in the host's memory");
  app.add_flag("--profile", o.profile, "milliseconds of each op");
  add_choice(app, "--device", o.device, "");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    std::exit(app.exit(e));
  }
  return o;
}

ModelConfig model_of(const Options& o) {
  if (!o.model.empty()) return read_model_config(o.model / "config.json");
  ModelConfig c;
  c.model_type = "qwen2_moe";
  c.vocab_size = o.vocab;
  c.hidden_size = o.width;
  c.intermediate_size = c.shared_expert_intermediate_size = o.shared_width;
  c.num_hidden_layers = o.layers;
  c.num_attention_heads = c.num_key_value_heads = static_cast<int>(o.heads);
  c.head_dim = o.width / o.heads;
  c.max_position_embeddings = o.seq_len;
  c.num_experts = o.experts;
  c.num_experts_per_tok = 4;
  c.moe_intermediate_size = o.expert_width;
  return c;
}

RunConfig run_of(const Options& o, const std::filesystem::path& tokens) {
  RunConfig r;
  r.model.init = ModelInit::kRandom;
  r.data.train = {{tokens.string(), 1.0}};
  r.data.seq_len = o.seq_len;
  r.train.steps = o.steps;
  r.train.micro_batch = o.tokens / o.seq_len;
  r.train.global_batch = r.train.micro_batch * o.micro_batches;
  r.train.precision = o.precision;
  r.train.recompute = o.recompute;
  r.kernels = o.kernels;
  r.parallel.reduce = o.precision == Precision::kFp32 ? Precision::kFp32 : o.reduce;
  r.optimizer.name = o.optimizer;
  r.optimizer.lr = 1e-4;
  r.optimizer.offload = o.offload;
  r.schedule.name = ScheduleKind::kConstant;
  return r;
}

std::filesystem::path random_tokens(const std::filesystem::path& folder, const Options& o,
                                    std::int64_t vocab) {
  std::vector<std::uint32_t> tokens(static_cast<std::size_t>(o.tokens * o.micro_batches * (o.steps + 1) + 1));
  std::minstd_rand random(1);
  for (std::uint32_t& t : tokens)
    t = static_cast<std::uint32_t>(random() % static_cast<std::uint64_t>(vocab));
  const auto path = folder / "tokens.h5";
  write_token_file(path, tokens, {}, vocab);
  return path;
}

// A moment of a step: a place in a GPU's stream, or what the clock says.
class Moment {
 public:
  explicit Moment(const Exec& ex) : told_(std::chrono::steady_clock::now()) {
    if (ex.device.type == DeviceType::kCpu) return;
    event_ = std::make_unique<gpu::Event>(true);
    event_->record(*ex.stream);
  }
  double seconds_since(const Moment& before) const {
    if (event_) return event_->seconds_since(*before.event_);
    return std::chrono::duration<double>(told_ - before.told_).count();
  }

 private:
  std::chrono::steady_clock::time_point told_;
  std::unique_ptr<gpu::Event> event_;  // null on the CPU
};

// From where an op is booked to where the next one is: what it takes there, on a GPU with what the host kept the stream
// waiting. What is computed twice is "op again", a teacher's "op of the teacher". (Copies that no op books count with
// the op before.)
void profile(Session& s, Trainer& trainer, std::int64_t step) {
  std::vector<std::pair<std::string, Moment>> points;
  const auto point = [&](const std::string& op) { points.emplace_back(op, Moment(s.memory.exec)); };
  point("before the first");
  s.memory.ledger.listen([&](const ToldOp& told) {
    const char* whose = told.books == Books::kAgain     ? " again"
                        : told.books == Books::kTeacher ? " of the teacher"
                                                        : "";
    point(fmt::format("{}{}", told.name, whose));
  });
  trainer.step(step);
  point("end");
  s.memory.ledger.listen({});
  if (s.memory.stream) s.memory.stream->synchronize();
  struct Sum {
    double seconds = 0;
    int calls = 0;
  };
  std::map<std::string, Sum> by_op;
  for (std::size_t i = 0; i + 1 < points.size(); ++i) {
    Sum& sum = by_op[points[i].first];
    sum.seconds += points[i + 1].second.seconds_since(points[i].second);
    ++sum.calls;
  }
  for (const auto& [op, sum] : by_op) {
    const auto cost = s.memory.ledger.entries().find(op);
    const bool booked = cost != s.memory.ledger.entries().end();
    const double flops = booked ? cost->second.flops : 0;
    const double bytes = booked ? cost->second.bytes_read + cost->second.bytes_written : 0;
    fmt::print(
        R"({{"op": "{}", "calls": {}, "milliseconds": {:.3f}, "tflops": {:.1f}, "gbytes_per_s": {:.0f}}})"
        "\n",
        op, sum.calls, sum.seconds * 1e3, flops / sum.seconds * 1e-12, bytes / sum.seconds * 1e-9);
  }
}

void run(const Options& o, Runtime& runtime) {
  UPMOE_CHECK(o.seq_len > 0 && o.tokens % o.seq_len == 0, "{} tokens in sequences of {}", o.tokens,
              o.seq_len);
  const Device device = runtime.choose_device(o.device);
  const ModelConfig model = model_of(o);
  const test::TemporaryDirectory folder;
  const std::filesystem::path tokens = random_tokens(folder.path(), o, model.vocab_size);
  const RunConfig config = run_of(o, tokens);
  if (const auto problems = problems_of(config, model, 1); !problems.empty())
    fail(ExitCode::kUsage, "{}", problems.front());
  Session s(config, model, runtime.world(), device);
  s.params.initialise(s.memory.exec, 1);
  s.optimizer.reset(s.memory.exec);
  s.open_data(0);
  Trainer trainer(s);
  for (std::int64_t step = 1; step <= o.steps; ++step) {
    const StepReport r = trainer.step(step);
    fmt::print(
        R"({{"step": {}, "loss": {:.6f}, "grad_norm": {:.4f}, "seconds": {:.6f}, "tokens_per_s": {:.1f}, "tflops": {:.3f}}})"
        "\n",
        step, r.loss, r.grad_norm, r.seconds, static_cast<double>(o.tokens * o.micro_batches) / r.seconds,
        r.flops_per_rank / r.seconds * 1e-12);
    std::fflush(stdout);
  }
  const MemoryUse use = s.memory_use();
  fmt::print(R"({{"device": "{}", "parameters_bytes": {}, "optimizer_bytes": {}, "scratch_peak_bytes": {}}})"
             "\n",
             device.type == DeviceType::kCuda ? gpu::name_of(device.index) : "cpu",
             use.parameters + use.gradients, use.optimizer, use.scratch);
  if (o.profile) profile(s, trainer, o.steps + 1);
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  try {
    Runtime runtime(&argc, &argv);
    run(options, runtime);
  } catch (const Error& e) {
    std::fprintf(stderr, "bench_step: error: %s\n", e.what());
    return static_cast<int>(e.code());
  }
}
