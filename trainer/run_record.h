#pragma once
// What a run was, for who reads its numbers later: RUN_DIR/starts.jsonl, an object for each time it was started.

#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "data/model_source.h"
#include "trainer/checkpoint.h"
#include "trainer/held_out.h"
#include "trainer/session.h"

namespace upmoe {

// What only the place knows where the command was given.
struct RunOrigin {
  std::vector<std::string> command = {};  // its words, with the program's name
  std::string version = {}, commit = {};  // of the program; empty: unknown
  std::string machine = {};               // what rank 0 computes on, in words
  int hosts = 1;
};

// The words that this process was started with; empty where the system does not tell.
std::vector<std::string> command_of_this_process();
// What the build left beside the program: the commit that it was linked at, with "-dirty" behind it when files
// differed from it. Empty: unknown.
std::string commit_of_this_program();

struct RunStart {
  RunOrigin origin;
  std::string cores = {};   // what the ranks compute on, in words; empty: not said
  std::string digest = {};  // of the program
  // What the weights were read from; null where they are random.
  const ModelSource* weights = nullptr;
  std::span<const HeldOutData> held_out = {};
};

// One JSON object without a newline: command, program, machine, mesh, model, recipe (of an upcycled model, from the
// report beside it), teacher, what is frozen, data. Rank 0.
std::string start_record(const RunStart& start, const Session& session, const TrainState& state);
// Adds it to the file; what a run that begins anew finds there goes.
void write_start(const std::filesystem::path& run_dir, const std::string& record, bool goes_on);

}  // namespace upmoe
