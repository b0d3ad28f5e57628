#pragma once
// The sets that a run is evaluated on: data.valid, one without a name or several with theirs.

#include <memory>
#include <string>
#include <vector>

#include "configs/run_config.h"
#include "trainer/evaluation.h"

namespace upmoe {

struct HeldOutData {
  std::string name;  // empty: the only one
  std::unique_ptr<TokenDataset> data;
};
std::vector<HeldOutData> open_held_out(const RunConfig::Data& data, std::int64_t vocab_size);
std::string fingerprint_of(const std::vector<HeldOutData>& sets);  // of their files, as far as they tell

struct HeldOutLoss {
  std::string name;
  EvalResult result;
};
// Of all sets together: the mean loss over all their targets. Not of none.
EvalResult together(const std::vector<HeldOutLoss>& losses);

}  // namespace upmoe
