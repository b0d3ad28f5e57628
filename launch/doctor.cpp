// upmoe doctor: where the ranks of a job are, what they may take, what they reach, and what keeps a run from starting.

#include <algorithm>
#include <chrono>
#include <ctime>

#include "configs/run_config.h"
#include "configs/run_problems.h"
#include "data/folder.h"
#include "kernels/core/gpu.h"
#include "kernels/core/log.h"
#include "launch/command_line.h"
#include "launch/commands.h"
#include "launch/doctor_report.h"
#include "launch/output.h"
#include "parallel/host.h"
#include "parallel/texts.h"
#include "parallel/watchdog.h"
#include "trainer/diagnosis/libraries.h"
#include "trainer/diagnosis/machine_facts.h"
#include "trainer/diagnosis/run_inputs.h"
#include "trainer/diagnosis/warnings.h"
#include "trainer/one_program.h"
#include "trainer/run_directory.h"
#include "trainer/run_lock.h"
#include "trainer/shared_folder.h"

namespace upmoe {

namespace {

namespace fs = std::filesystem;

// Without any progress, such as of a network that answers nothing.
constexpr std::chrono::seconds kDeadline{120};
constexpr std::uint64_t kTrialBytes = std::uint64_t{16} << 20;
constexpr std::int64_t kClockSkewMs = 2000;

struct DoctorArguments {
  std::string file, dir;
  std::vector<std::string> overrides;
  DeviceChoice device = DeviceChoice::kAuto;
  bool measure = false, as_json = false;
};

class Examination {
 public:
  Examination(Runtime& runtime, fs::path folder) : runtime_(runtime), folder_(std::move(folder)) {
    mine_.host = host_name();
    mine_.facts = read_host();
    mine_.threads = runtime.cores().threads;
    mine_.speaks = runtime.cores().speaks;
  }
  // Each is collective; what fails is a finding, and the examination goes on.
  void device(DeviceChoice wish);
  void host();
  void programs();
  void clocks();
  void folder(bool of_a_run);
  void inputs(const RunConfig& run);

  std::vector<RankDiagnosis> of_all_ranks() {
    std::vector<RankDiagnosis> all;
    for (const std::string& text : gather_text(world(), to_text(mine_))) all.push_back(diagnosis_of(text));
    return all;
  }
  Device chosen() const { return device_; }
  const HostFacts& facts() const { return mine_.facts; }
  // What there is of the folder, on every rank: itself, or the nearest above it.
  fs::path existing() const {
    return with_system_errors([&] { return nearest_existing(fs::absolute(folder_).lexically_normal()); });
  }

 private:
  Communicator& world() { return runtime_.world(); }
  // What `body` throws as a finding of the rank that knows; its peers say nothing.
  template <class Body>
  bool fails(const Body& body) {
    try {
      with_system_errors(body);
      return false;
    } catch (const PeerError&) {  // told by another rank
    } catch (const Error& e) {
      mine_.findings.push_back({Severity::kFailure, e.code(), e.what()});
    }
    return true;
  }
  void add(const std::vector<Finding>& more) {
    mine_.findings.insert(mine_.findings.end(), more.begin(), more.end());
  }
  void shared_folder();
  void same_inputs(ReadInputs read, bool met);

  Runtime& runtime_;
  fs::path folder_;
  Device device_;
  RankDiagnosis mine_;
};

void Examination::device(DeviceChoice wish) {
  fails([&] { device_ = runtime_.choose_device(wish); });
  mine_.device = device_.type == DeviceType::kCuda
                     ? fmt::format("GPU {}: {}", gpu::pci_id(device_.index), gpu::name_of(device_.index))
                     : "CPU";
}

void Examination::host() {
  const Surroundings where = surroundings_of(world());
  if (!mine_.speaks) return;
  if (const std::string words = complaint(runtime_.cores()); !words.empty())
    mine_.findings.push_back({Severity::kWarning, ExitCode::kDone, words});
  add(findings_of(mine_.facts, where));
}

void Examination::programs() {
  fails([&] { require_one_program(world()); });
}

void Examination::clocks() {
  using namespace std::chrono;
  world().barrier();
  const std::vector<std::int64_t> all =
      gather(world(), duration_cast<milliseconds>(system_clock::now().time_since_epoch()).count());
  const auto [first, last] = std::minmax_element(all.begin(), all.end());
  if (world().rank() == 0 && *last - *first > kClockSkewMs)
    mine_.findings.push_back(
        {Severity::kWarning, ExitCode::kDone,
         fmt::format(
             "the clocks of ranks {} and {} are {:.1f} s apart, so that times in their lines mislead: let "
             "the hosts keep time by NTP",
             first - all.begin(), last - all.begin(), static_cast<double>(*last - *first) / 1000)});
}

void Examination::folder(bool of_a_run) {
  if (mine_.speaks && !fails([&] {
        if (of_a_run) require_run_directory(folder_);
        mine_.folder = read_folder(folder_, read_mounts());
      })) {
    FolderTrial trial;
    if (fails([&] { trial = try_folder(mine_.folder.existing, kTrialBytes, world().rank()); })) {
      add(findings_of(mine_.folder));
    } else {
      mine_.trial = fmt::format("written at {:.2f} GB/s, fsync {:.1f} ms, rename {:.1f} ms",
                                trial.write_bytes_per_s * 1e-9, trial.sync_s * 1e3, trial.rename_s * 1e3);
      add(findings_of(mine_.folder, trial));
    }
  }
  if (of_a_run && world().rank() == 0) fails([&] { RunLock::require_free(folder_); });
  shared_folder();
}

// Every rank opens the files itself; all together find the checkpoint.
void Examination::inputs(const RunConfig& run) {
  if (fails([&] { require_equal(world(), "configurations", to_yaml(run)); })) return;
  StartingPoint start;
  if (fails([&] { start = starting_point_of(run, world()); })) return;
  add(start.passed_over);
  ReadInputs read;
  const std::size_t before = mine_.findings.size();
  const bool met = !fails([&] {
    read = require_inputs(on_device(run, device_), start.checkpoint, world().size(), world().rank() == 0);
  });
  if (!mine_.speaks) mine_.findings.resize(before);  // its host has said it
  same_inputs(std::move(read), met);
}

// Of the ranks that have met them; the others have a finding already.
void Examination::same_inputs(ReadInputs read, bool met) {
  if (gather(world(), met ? 1 : 0).front() == 0) return;
  for (std::string* text : {&read.models, &read.data, &read.held_out}) {
    const std::string of_rank_0 = broadcast_text(world(), *text, 0);
    if (!met) *text = of_rank_0;
  }
  fails([&] { compare_models(world(), read); });
  fails([&] { compare_data(world(), read); });
}

void Examination::shared_folder() {
  if (surroundings_of(world()).hosts == 1) return;
  const fs::path place = broadcast_text(world(), existing().string(), 0);
  bool seen = true;
  fails([&] { seen = sees_files_of_rank_0(world(), place); });
  if (!seen && mine_.speaks)
    mine_.findings.push_back({Severity::kFailure, ExitCode::kBadInput, words_of_unshared(folder_)});
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char words[16] = {};
  std::strftime(words, sizeof words, "%Y-%m-%d", &utc);
  return words;
}

void print_machine(Runtime& runtime, const Examination& found) {
  Communicator& world = runtime.world();
  const bool speaks = world.rank() == 0;
  const Surroundings where = surroundings_of(world);
  fs::path folder;
  run_agreed(world, [&] { folder = found.existing(); });
  const MeasuredMachine measured =
      measure_machine(world, found.chosen(), folder, {}, [&](const std::string& what) {
        if (speaks) log::info("measuring {}", what);
      });
  if (!speaks) return;
  if (measured.transfers.empty())
    log::info("links are not measured: one rank has nobody to send to; start it under mpirun");
  else
    log::info("transfers:\n{}", transfers_table(measured.transfers));
  Machine m = measured.machine;
  MeasuredDevice device{.gpu = {}, .cores = runtime.cores().cores};
  if (found.chosen().type == DeviceType::kCuda) {
    device.gpu = gpu::name_of(found.chosen().index);
    device.gpu_bytes = static_cast<double>(gpu::memory_of(found.chosen().index));
    log::info(
        "overhead_gb is not measured on a GPU: it is what a rank's process takes of the GPU's memory besides "
        "its tensors (driver, libraries, code), and a plan counts nothing for it until the file says it");
  }
  add_facts(m, device, found.facts(), where);
  m.source = m.rates.source = fmt::format(
      "measured by upmoe {} doctor --measure on {}, {} rank{} on {} host{}", UPMOE_VERSION, today(),
      where.ranks, where.ranks == 1 ? "" : "s", where.hosts, where.hosts == 1 ? "" : "s");
  print_result(to_yaml(m));
}

int run_doctor(const DoctorArguments& a, Runtime& runtime) {
  watchdog::start(kDeadline, runtime.world().rank());
  RunConfig run;
  if (!a.file.empty()) run_agreed(runtime.world(), [&] { run = read_run_config(a.file, a.overrides); });
  const fs::path folder = !a.dir.empty()   ? fs::path(a.dir)
                          : a.file.empty() ? fs::path(".")
                                           : fs::path(run.run.dir);
  Examination examination(runtime, folder);
  examination.device(a.file.empty() ? a.device : run.device);
  examination.host();
  examination.programs();
  examination.clocks();
  examination.folder(!a.file.empty() && a.dir.empty());
  if (!a.file.empty()) examination.inputs(run);
  const DoctorReport report = doctor_report(examination.of_all_ranks(), library_versions());
  const bool healthy = report.code == ExitCode::kDone;
  run_agreed(runtime.world(), [&] {
    if (runtime.world().rank() != 0) return;
    // With --measure standard output is the machine's file and nothing else.
    if (a.measure)
      std::fputs(report.text.c_str(), stderr);
    else
      print_result(a.as_json ? report.json : report.text);
  });
  if (a.measure && healthy) print_machine(runtime, examination);
  return static_cast<int>(report.code);
}

}  // namespace

void add_doctor(CLI::App& app, Handler& handler) {
  auto a = std::make_shared<DoctorArguments>();
  CLI::App* command = app.add_subcommand(
      "doctor", "Ranks, hosts, devices, limits and disk of a job, and what keeps a run from starting");
  CLI::Option* run = as_path(command->add_option(
      "run", a->file,
      "Run configuration (YAML) that is meant: its run.dir, device, model and data; it is not trained"));
  command->add_option("overrides", a->overrides, "section.key=value of it")->needs(run);
  as_path(
      command->add_option("--dir", a->dir, "Folder that a run would write to (default: run.dir, or here)"));
  CLI::Option* device =
      add_choice(*command, "--device", a->device, "What to compute on, without a run's file");
  device->excludes(run);
  CLI::Option* measure = command->add_flag("--measure", a->measure,
                                           "Measure products, memory, links and disk; standard output is a "
                                           "file for configs/machines, all else goes to standard error");
  command->add_flag("--json", a->as_json, "One JSON object on standard output")->excludes(measure);
  command->footer(
      "Status 0 when a run could start, else the one it would end with. Under mpirun or srun it looks at all "
      "ranks and\nlinks between them.");
  command->callback([a, &handler] { handler = [a](Runtime& runtime) { return run_doctor(*a, runtime); }; });
}

}  // namespace upmoe
