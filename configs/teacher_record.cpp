#include "configs/teacher_record.h"

#include <fmt/format.h>

#include <algorithm>

#include "configs/run_problems.h"
#include "configs/schema.h"

namespace upmoe {

void add_teacher(Schema& schema, RunConfig::Train::Teacher& teacher) {
  schema.section("train.teacher")
      .key("model", teacher.model, {.may_be_empty = true, .path = true})
      .says(
          "Model of the same vocabulary whose logits this one learns from as well, as model.path: the dense "
          "model that it was made of. docs/distillation.md.")
      .key("weight", teacher.weight, {.least = 0, .most = 1, .above = true})
      .says("Of the divergence from the teacher in the loss; the cross entropy has what is left of 1.")
      .key("temperature", teacher.temperature, {.least = 0.01, .most = 1000})
      .says("What both models' logits are divided by in the divergence, which counts its square times.");
}

RunConfig run_of_teacher(const RunConfig& run) {
  UPMOE_CHECK(run.train.teacher.config != nullptr, "the configuration of {} was not read",
              run.train.teacher.model);
  RunConfig own = run;
  if (run.train.teacher.config->num_moe_layers() == 0)
    own.parallel.ep = own.parallel.etp = 1, own.parallel.node_ranks = 0;
  own.parallel.reduce = Precision::kFp32;
  own.model.path = run.train.teacher.model;
  own.router = {.dtype = run.router.dtype};
  own.kernels = {};
  own.lora = {};
  own.freeze = {};
  own.optimizer.groups = {};
  own.train.teacher = {};
  return own;
}

std::vector<std::string> teacher_problems(const RunConfig& run, const ModelConfig& model, int world_size,
                                          const std::vector<std::string>& found) {
  if (!run.train.teacher.given()) return {};
  const RunConfig own = run_of_teacher(run);
  const ModelConfig& teacher = *run.train.teacher.config;
  std::vector<std::string> all;
  if (run.parallel.pp > 1)
    all.push_back(fmt::format(
        "train.teacher: parallel.pp is {}, and a teacher's logits are needed on the last stage, which has no "
        "part of its first layers; a teacher over several stages is not built yet. Use pp 1, with tp, cp or "
        "ep",
        run.parallel.pp));
  if (teacher.vocab_size != model.vocab_size)
    all.push_back(fmt::format(
        "train.teacher.model: {} has a vocabulary of {} tokens, and the model one of {}: what it says of a "
        "token is of another token. Take a model with the same tokenizer, best the one that this was made of",
        run.train.teacher.model, teacher.vocab_size, model.vocab_size));
  if (teacher.router.routes_groups()) {
    all.push_back(
        fmt::format("train.teacher.model: the routers of {} ({}) share experts among the tokens of several "
                    "sequences; a teacher has to say of each token by itself what follows it",
                    run.train.teacher.model, name_of(teacher.router.kind)));
    return all;
  }
  for (const std::string& p : problems_of(own, teacher, world_size))
    if (std::find(found.begin(), found.end(), p) == found.end()) all.push_back("train.teacher: " + p);
  return all;
}

}  // namespace upmoe
