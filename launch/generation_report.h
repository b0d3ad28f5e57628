#pragma once
// What `upmoe generate --bench` prints: rates, memory, and the best times of a data sheet beside them; for people, and
// as JSON.

#include <optional>
#include <string>
#include <vector>

#include "configs/machine.h"
#include "trainer/cost/roofline.h"
#include "trainer/generation_room.h"

namespace upmoe {

struct TimedModel {
  std::string name;
  bool random_weights = false;
  std::optional<ServedModel> served;   // given with a machine
  std::vector<GenerationRates> rates;  // by concurrency, rising
  std::optional<RequestRoom> room;     // where it chose these numbers, of all models or of none
};

struct TimedOn {
  std::string device, precision;  // in words
  int ranks = 1;
  std::optional<Machine> machine;
  double rank_bytes = 0;  // that room was looked for in
};

struct GenerationReport {
  std::string text, json;  // each ends with a line break
};
// Of one model at least; the others are compared with the first.
GenerationReport generation_report(const std::vector<TimedModel>& models, const RatesRequest& request,
                                   const TimedOn& on);

}  // namespace upmoe
