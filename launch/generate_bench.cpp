#include "launch/generate_bench.h"

#include <fmt/ranges.h>

#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "launch/generation_report.h"
#include "launch/output.h"
#include "launch/shipped.h"
#include "launch/whole_model.h"
#include "trainer/generation_room.h"
#include "trainer/same_inputs.h"

namespace upmoe {

namespace {

// A model that is timed: with weights of its own, or with random ones.
struct Subject {
  std::string name;
  std::unique_ptr<ModelSource> weights;  // null: random ones
  ModelConfig config;
  MeshSpec mesh;
  std::unique_ptr<RankModel> model;
  std::vector<std::int64_t> concurrency;
  std::optional<RequestRoom> room;  // where it chose these numbers
};

void check_length(const Subject& s, const RatesRequest& request) {
  const std::int64_t positions = s.config.max_position_embeddings;
  if (request.prompt > positions)
    fail(ExitCode::kUsage, "--in {}: {} has positions for {} tokens", request.prompt, s.name, positions);
  if (request.prompt + request.output > positions)
    log::warning("--in {} --out {}: {} was made for {} positions", request.prompt, request.output, s.name,
                 positions);
}

std::vector<Subject> open_all(const BenchArguments& a, Communicator& world) {
  std::vector<Subject> subjects;
  run_agreed(world, [&] {
    for (const std::string& given : a.models) {
      Subject s{name_of_model(given), weights_of_model(given), {}, {}, nullptr, a.concurrency, {}};
      s.config = s.weights ? s.weights->config() : shape_of_model(given);
      s.mesh = generation_mesh(s.config, world.size(), a.tp);
      if (const std::string wrong = refusal_of(s.config, {}); !wrong.empty())
        fail(ExitCode::kBadInput, "{}: {}", given, wrong);
      if (world.rank() == 0) check_length(s, a.request);
      subjects.push_back(std::move(s));
    }
  });
  for (const Subject& s : subjects)
    s.weights ? require_same_model(world, s.name, *s.weights)
              : require_equal(world, fmt::format("configurations of {}", s.name), function_of(s.config));
  return subjects;
}

// What fits decides how many requests are timed; the bytes of a rank that it goes by. Before any model is there.
double choose_concurrency(std::vector<Subject>& subjects, const BenchArguments& a, Communicator& world,
                          Device device) {
  const double bytes = a.memory_gb > 0 ? a.memory_gb * 1e9 : bytes_for_a_rank(world, device);
  std::vector<ModelToServe> models;
  for (const Subject& s : subjects) models.push_back({s.name, s.config, s.mesh});
  const std::vector<RequestRoom> rooms =
      room_for_requests(models, world, a.compute.model_options(), a.request, device, bytes);
  for (std::size_t m = 0; m < subjects.size(); ++m) {
    subjects[m].room = rooms[m];
    subjects[m].concurrency = concurrency_up_to(rooms[m].requests);
    log::info("{}: room for {}{} requests at once; timed: {}", subjects[m].name,
              rooms[m].more_fit ? "more than " : "", rooms[m].requests,
              fmt::join(subjects[m].concurrency, ", "));
  }
  return bytes;
}

// Behind this its parameters have values.
void make_model(Subject& s, const BenchArguments& a, Communicator& world, Device device) {
  s.model = std::make_unique<RankModel>(s.config, s.mesh, world, device, a.compute.model_options());
  RankModel& model = *s.model;
  run_agreed(world, [&] {
    if (!s.weights)
      return model.params.initialise(model.memory.exec, static_cast<std::int64_t>(a.request.seed));
    load_weights(model, *s.weights);
  });
  if (!s.weights && world.rank() == 0) log::info("{}: a configuration alone; its weights are random", s.name);
}

std::vector<std::vector<GenerationRates>> measure(std::vector<Subject>& subjects, const BenchArguments& a,
                                                  bool first) {
  const Device device = subjects.front().model->memory.exec.device;
  Arena keep(device, arena_address_space(device), "keys, values and activations");  // of one at a time
  std::vector<ModelToTime> models;
  for (const Subject& s : subjects) models.push_back({s.config.vocab_size, s.concurrency});
  return measure_rates(
      models, a.request,
      [&](std::size_t m, std::span<const Prompt> prompts, const GenerationOptions& options) {
        Generated g = generate(*subjects[m].model, keep, prompts, options);
        if (first && options.max_new_tokens == a.request.output)
          log::info("{}, {} at once: {} tokens of prompts in {:.3g} s, {} new ones in {:.3g} s more",
                    subjects[m].name, prompts.size(), g.prompt_tokens, g.prefill_seconds, g.new_tokens,
                    g.decode_seconds);
        return g;
      });
}

// With what each needs at best, where that is asked for; a machine that cannot say it ends the command before it
// begins.
std::vector<TimedModel> best_times(const std::vector<Subject>& subjects, const BenchArguments& a,
                                   const std::optional<Machine>& machine) {
  std::vector<TimedModel> timed;
  for (const Subject& s : subjects) {
    timed.push_back({s.name, s.weights == nullptr, {}, {}, {}});
    if (!machine) continue;
    timed.back().served.emplace(s.config, a.request.prompt, dtype_of(a.compute.precision));
    decode_seconds(*timed.back().served, *machine, 1, 1);
  }
  return timed;
}

}  // namespace

int run_generate_bench(const BenchArguments& a, Runtime& runtime) {
  Communicator& world = runtime.world();
  run_agreed(world, [&] {
    if (!a.machine.empty() && world.size() > 1)
      fail(ExitCode::kUsage, "--machine: best times are of one device; start one rank, or leave it out");
    if (a.memory_gb > 0 && !a.concurrency.empty())
      fail(ExitCode::kUsage, "--memory is what --concurrency auto goes by; ask for that, or leave it out");
  });
  const Device device = a.compute.choose_device(runtime);
  std::vector<Subject> subjects = open_all(a, world);
  const bool on_gpu = device.type == DeviceType::kCuda;
  TimedOn on{on_gpu ? gpu::name_of(device.index) : fmt::format("CPU, {} threads", runtime.cores().threads),
             name_of(a.compute.precision),
             world.size(),
             {},
             0};
  std::vector<TimedModel> timed;
  run_agreed(world, [&] {
    if (!a.machine.empty()) on.machine = read_machine(shipped_or_own(kMachines, a.machine));
    timed = best_times(subjects, a, on.machine);
  });
  if (a.concurrency.empty()) on.rank_bytes = choose_concurrency(subjects, a, world, device);
  for (Subject& s : subjects) make_model(s, a, world, device);
  const bool first = world.rank() == 0;
  std::vector<std::vector<GenerationRates>> rates = measure(subjects, a, first);
  if (!first) return 0;
  for (std::size_t m = 0; m < timed.size(); ++m) {
    timed[m].rates = std::move(rates[m]);
    timed[m].room = subjects[m].room;
  }
  const GenerationReport report = generation_report(timed, a.request, on);
  print_result(a.as_json ? report.json : report.text);
  return 0;
}

}  // namespace upmoe
