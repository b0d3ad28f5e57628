#pragma once
// What `upmoe doctor` prints: one report for all ranks, made of what each of them found.

#include <string>
#include <utility>
#include <vector>

#include "trainer/diagnosis/findings.h"
#include "trainer/diagnosis/machine_rates.h"

namespace upmoe {

struct RankDiagnosis {
  std::string host;    // its name
  std::string device;  // what it computes on
  int threads = 1;
  bool speaks = true;  // for its host: the facts below, but for the cores, are told once
  HostFacts facts;
  FolderFacts folder;
  std::string trial;  // how writing to it went, in words
  std::vector<Finding> findings;
};

// To send between ranks, and back.
std::string to_text(const RankDiagnosis& diagnosis);
RankDiagnosis diagnosis_of(const std::string& text);

struct DoctorReport {
  std::string text, json;           // each ends with a line break
  ExitCode code = ExitCode::kDone;  // of the first failure, by rank
};
DoctorReport doctor_report(const std::vector<RankDiagnosis>& by_rank,
                           const std::vector<std::pair<std::string, std::string>>& libraries);

std::string transfers_table(const std::vector<TransferTime>& transfers);

}  // namespace upmoe
