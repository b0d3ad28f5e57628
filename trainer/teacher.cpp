#include "trainer/teacher.h"

#include <memory>

#include "configs/teacher_record.h"
#include "trainer/model/make_transformer.h"
#include "trainer/session.h"

namespace upmoe {

namespace {

ParamStore::Options storage_of(const RunConfig& run, Device device) {
  ParamStore::Options storage;
  storage.dtype = dtype_of(run.train.precision);
  storage.fp32 = fp32_roles(run.router.dtype);
  storage.device = device;
  storage.gradients = false;
  return storage;
}

}  // namespace

void read_teacher(RunConfig& run) {
  if (!run.train.teacher.given()) return;
  run.train.teacher.config = std::make_shared<const ModelConfig>(config_of_model(run.train.teacher.model));
}

MeshSpec mesh_of_teacher(const RunConfig& run, int world_size) {
  return mesh_of(run_of_teacher(run), world_size);
}

Teacher::Teacher(const RunConfig& run, Communicator& world, Device device)
    : config_(*run.train.teacher.config),
      mesh_(mesh_of_teacher(run, world.size()), world, run_of_teacher(run).parallel.node_ranks),
      params_(config_, mesh_.spec(), one_stage(config_.num_hidden_layers), world.rank(),
              storage_of(run, device)),
      chunks_(make_chunks(config_, params_, mesh_, one_stage(config_.num_hidden_layers), Recompute::kNone)) {}

// Begins with a buffer that its files know nothing of as the table says.
void Teacher::load(Exec& ex, const ModelSource& source) {
  load(ex, [&](const ParamSpec& spec, const Box& box, TensorView out) {
    source.has(spec) ? source.read(spec, box, out) : initial_values(spec, 0, box, out);
  });
}

}  // namespace upmoe
