#include "trainer/training_run.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "data/model_source.h"
#include "data/posix_file.h"
#include "kernels/core/log.h"
#include "parallel/watchdog.h"
#include "trainer/checkpoint.h"
#include "trainer/metrics.h"
#include "trainer/stop_requests.h"
#include "trainer/trainer.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

// One job per run directory: an advisory lock held by rank 0 for the life of the process.
class RunLock {
 public:
  explicit RunLock(const fs::path& dir) {
    const fs::path path = dir / "lock";
    fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (fd_ < 0) fail(ExitCode::kBadInput, "{}: cannot be opened: {}", path.string(), std::strerror(errno));
    if (flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      char owner[256] = {};
      const ssize_t n = pread(fd_, owner, sizeof owner - 1, 0);
      close(fd_);
      fail(ExitCode::kUsage,
           "{}: another job is training in this directory ({}); stop it or choose another run.dir",
           dir.string(), n > 0 ? owner : "unknown");
    }
    char host[128] = "host";
    gethostname(host, sizeof host - 1);
    const std::string me = fmt::format("host {}, pid {}", host, getpid());
    if (ftruncate(fd_, 0) != 0 || pwrite(fd_, me.data(), me.size(), 0) < 0)
      log::warning("{}: cannot be written: {}", path.string(), std::strerror(errno));
  }
  ~RunLock() { close(fd_); }
  RunLock(const RunLock&) = delete;

 private:
  int fd_ = -1;
};

// Two builds on two hosts would train, and differ in some later digit.
std::string program_digest() {
  return fmt::format("{:08x}", crc32c_of_file("/proc/self/exe"));
}

class Run {
 public:
  Run(const RunConfig& run, Communicator& world, const RunOptions& options)
      : run_(run),
        world_(world),
        dir_(run.run.dir),
        checkpoints_(dir_ / "checkpoints"),
        writer_(checkpoints_, run.checkpoint.keep) {
    require_equal(world_, "programs", program_digest());
    require_equal(world_, "configurations", to_yaml(run));
    run_agreed(world_, [&] { prepare(); });
    const std::optional<fs::path> newest = newest_usable(checkpoints_, world_);
    if (options.fresh && newest)
      fail(ExitCode::kUsage, "--fresh: {} holds {}; choose another run.dir or remove it", dir_.string(),
           newest->string());
    run_agreed(world_, [&] {
      const ModelConfig config = open_config(newest);
      require_possible(config);
      session_config_ = config;
    });
    session_ = std::make_unique<Session>(run_, session_config_, world_, options.device);
    run_agreed(world_, [&] { load(newest); });
    require_equal(world_, "training data", state_.fingerprint);
  }

  int execute();

 private:
  void prepare() {
    if (world_.rank() != 0) return;
    fs::create_directories(checkpoints_);
    lock_ = std::make_unique<RunLock>(dir_);
    fs::create_directories(dir_ / "logs");
  }

  // Weights to start from are opened only where they are wanted: init: random needs config.json alone.
  ModelConfig open_config(const std::optional<fs::path>& checkpoint) {
    if (!checkpoint && run_.model.init == "random") return read_model_config(run_.model.path);
    source_ = open_model(checkpoint ? *checkpoint : fs::path(run_.model.path));
    return source_->config();
  }

  void require_possible(const ModelConfig& model) const {
    const std::vector<std::string> problems = problems_of(run_, model, world_.size());
    if (problems.empty()) return;
    std::string all;
    for (const std::string& p : problems) all += "\n  " + p;
    const std::vector<std::string> near = nearest_meshes(run_, model, world_.size());
    if (!near.empty()) all += fmt::format("\npossible meshes of {} ranks, the nearest first:", world_.size());
    for (const std::string& mesh : near) all += "\n  " + mesh;
    fail(ExitCode::kUsage, "{}: this run is not possible:{}", run_.origin, all);
  }

  void load(const std::optional<fs::path>& checkpoint);
  void start_metrics();
  void evaluate_now(std::int64_t step);
  void begin_checkpoint(std::int64_t step, bool in_background);
  void finish_checkpoint();
  void poll_checkpoint();
  void count_nonfinite(const StepReport& report);
  void save_at_end(std::int64_t step);

  const RunConfig& run_;
  Communicator& world_;
  fs::path dir_, checkpoints_;
  std::unique_ptr<RunLock> lock_;
  CheckpointWriter writer_;
  ModelConfig session_config_;
  std::unique_ptr<ModelSource> source_;
  std::unique_ptr<Session> session_;
  std::unique_ptr<TokenDataset> valid_;
  std::unique_ptr<Metrics> metrics_;  // rank 0
  TrainState state_;
  std::int64_t saved_step_ = -1, evaluated_step_ = -1, nonfinite_ = 0;
};

void Run::load(const std::optional<fs::path>& checkpoint) {
  Session& s = *session_;
  if (checkpoint) {
    state_ = load_checkpoint(ShardStore(*checkpoint), s);
    saved_step_ = state_.step;
    if (world_.rank() == 0) log::info("resuming from {} (step {})", checkpoint->string(), state_.step);
  } else {
    state_.source = fs::absolute(run_.model.path).string();
    if (run_.model.init == "random") {
      s.params.initialise(s.memory.exec, run_.run.seed);
    } else {
      s.params.load(s.memory.exec, [&](const ParamSpec& spec, const Box& box, TensorView out) {
        source_->read(spec, box, out);
      });
    }
    s.optimizer.reset(s.memory.exec);
  }
  s.open_data(state_.samples);
  const std::string fingerprint = s.data->fingerprint();
  // Empty: an upcycled model put in place as step 0, which has seen no data.
  if (checkpoint && !state_.fingerprint.empty() && fingerprint != state_.fingerprint)
    fail(ExitCode::kBadInput,
         "the data changed since {}: its order is {}, now {}; restore data.* of {}/config.yaml, or start "
         "another run.dir",
         checkpoint->string(), state_.fingerprint, fingerprint, dir_.string());
  if (checkpoint && state_.samples != state_.step * run_.train.global_batch)
    fail(
        ExitCode::kUsage,
        "train.global_batch: the checkpoint consumed {} samples in {} steps, which {} per step does not give",
        state_.samples, state_.step, run_.train.global_batch);
  state_.fingerprint = fingerprint;
  if (!run_.data.valid.empty())
    valid_ = std::make_unique<TokenDataset>(std::vector<TokenDataset::Source>{{run_.data.valid, 1.0}},
                                            run_.data.seq_len, false, 0, s.config.vocab_size);
}

void Run::start_metrics() {
  world_.barrier();
  const double peak = measure_peak_flops(session_->memory.exec, session_->params.dtype());
  run_agreed(world_, [&] {
    if (world_.rank() != 0) return;
    metrics_ = std::make_unique<Metrics>(dir_, run_, state_.step, world_.size(), peak);
    std::ofstream config(dir_ / "config.yaml");
    config << to_yaml(run_);
    if (!config.flush()) fail(ExitCode::kBadInput, "{}: cannot be written", (dir_ / "config.yaml").string());
  });
  if (world_.rank() == 0) {
    const ParamCounts counts = count_params(session_->config);
    log::info("{} parameters, {} activated per token; {} ranks: {}; {} tokens per step", counts.total,
              counts.activated, world_.size(), session_->mesh.spec().str(),
              run_.train.global_batch * run_.data.seq_len);
    if (session_->plan.stages > 1) log::info("pipeline by cost: {}", describe(session_->plan));
  }
}

void Run::evaluate_now(std::int64_t step) {
  if (valid_ == nullptr || evaluated_step_ == step) return;
  evaluated_step_ = step;
  session_->reducer.await_all_values(session_->memory.exec);
  const EvalResult result =
      evaluate(session_->memory.exec, session_->pipeline, session_->mesh, *valid_,
               {run_.train.eval_sequences, run_.train.micro_batch, run_.data.mask_documents});
  if (metrics_) metrics_->evaluation(step, result);
}

// A failing disk does not stop training: the older checkpoints are intact, and the next interval tries again.
void Run::begin_checkpoint(std::int64_t step, bool in_background) {
  if (writer_.busy()) finish_checkpoint();
  if (saved_step_ == step) return;
  state_.step = step;
  state_.samples = step * run_.train.global_batch;
  try {
    writer_.begin(*session_, state_, world_, in_background);
    saved_step_ = step;
  } catch (const Error& e) {
    if (world_.rank() == 0)
      log::warning("checkpoint of step {} failed, training goes on: {}", step, e.what());
  }
}

void Run::finish_checkpoint() {
  try {
    const fs::path path = writer_.finish(world_);
    if (world_.rank() == 0) log::info("checkpoint {}", path.string());
  } catch (const Error& e) {
    if (*e.what() != 0)
      log::warning("checkpoint of step {} failed, training goes on: {}", saved_step_, e.what());
    saved_step_ = -1;
  }
}

// Commits a background checkpoint once every rank's part lies on the disk.
void Run::poll_checkpoint() {
  if (!writer_.busy()) return;
  std::int64_t written = writer_.written() ? 1 : 0;
  world_.all_reduce(host_view(&written, {1}), ReduceOp::kMin);
  if (written == 1) finish_checkpoint();
}

void Run::count_nonfinite(const StepReport& report) {
  nonfinite_ = report.skipped ? nonfinite_ + 1 : 0;
  if (!report.skipped) return;
  if (!report.culprit.empty())
    log::warning("step {}: the gradient of {} is not finite; no update", report.step, report.culprit);
  if (nonfinite_ < run_.train.nonfinite_patience) return;
  if (writer_.busy()) finish_checkpoint();
  fail(ExitCode::kNumeric,
       "loss {} and gradient norm {} were not finite for {} steps in a row, the last one {}; the newest "
       "checkpoint in {} is "
       "from before. Lower optimizer.lr, or look at the data of samples {} to {}",
       report.loss, report.grad_norm, nonfinite_, report.step, checkpoints_.string(),
       (report.step - nonfinite_) * run_.train.global_batch, report.step * run_.train.global_batch - 1);
}

void Run::save_at_end(std::int64_t step) {
  begin_checkpoint(step, false);
  if (writer_.busy()) finish_checkpoint();
  if (saved_step_ != step)
    fail(ExitCode::kBadInput, "the checkpoint of step {} could not be written to {}; see the warning above",
         step, checkpoints_.string());
}

int Run::execute() {
  if (state_.step >= run_.train.steps) {
    if (world_.rank() == 0)
      log::info("nothing to do: step {} of {} is reached", state_.step, run_.train.steps);
    return static_cast<int>(ExitCode::kDone);
  }
  start_metrics();
  Trainer trainer(*session_);
  const auto due = [](std::int64_t every, std::int64_t step) { return every > 0 && step % every == 0; };
  if (state_.step == 0) evaluate_now(0);
  for (std::int64_t step = state_.step + 1; step <= run_.train.steps; ++step) {
    const StepReport report = trainer.step(step, take_requests());
    watchdog::heartbeat();
    if (metrics_) metrics_->step(report);
    count_nonfinite(report);
    if (due(run_.train.eval_every, step)) evaluate_now(step);
    poll_checkpoint();
    if (report.requests >= kStopRequest) {
      save_at_end(step);
      if (world_.rank() == 0)
        log::info("stopped on request after step {}; start the same command again to go on", step);
      return static_cast<int>(ExitCode::kStopped);
    }
    if (due(run_.checkpoint.every, step) || report.requests > 0)
      begin_checkpoint(step, run_.checkpoint.async);
    if (writer_.busy() && !run_.checkpoint.async) finish_checkpoint();
  }
  evaluate_now(run_.train.steps);
  save_at_end(run_.train.steps);
  return static_cast<int>(ExitCode::kDone);
}

}  // namespace

int train(const RunConfig& run, Communicator& world, const RunOptions& options) {
  Run job(run, world, options);
  return job.execute();
}

}  // namespace upmoe
