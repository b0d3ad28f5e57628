#pragma once
// What looks wrong with a host or a folder, each in words that say how to mend it. `upmoe doctor` shows all of it, a
// run of `upmoe train` what is a warning or worse: the same functions, so the same words.

#include <string>
#include <vector>

#include "kernels/core/check.h"
#include "trainer/diagnosis/folder_facts.h"
#include "trainer/diagnosis/host_facts.h"

namespace upmoe {

enum class Severity { kNote, kWarning, kFailure };  // a failure: no run could start

struct Finding {
  Severity severity = Severity::kNote;
  ExitCode code = ExitCode::kDone;  // of a failure: what a run would end with
  std::string words;                // one line
};

// Where the ranks of a job are, as one of them sees it.
struct Surroundings {
  int ranks = 1, ranks_here = 1, hosts = 1;
  int gpus = 0;  // that this program may use on this host
};

std::vector<Finding> findings_of(const HostFacts& host, const Surroundings& where);
std::vector<Finding> findings_of(const FolderFacts& folder);
std::vector<Finding> findings_of(const FolderFacts& folder, const FolderTrial& trial);

}  // namespace upmoe
