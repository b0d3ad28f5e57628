#include "trainer/held_out.h"

namespace upmoe {

std::vector<HeldOutData> open_held_out(const RunConfig::Data& data, std::int64_t vocab_size) {
  std::vector<HeldOutData> sets;
  for (const HeldOutSet& set : data.valid)
    sets.push_back({set.name, std::make_unique<TokenDataset>(
                                  std::vector<TokenDataset::Source>{{set.path, 1.0, data.valid_loss_mask}},
                                  data.seq_len, false, 0, vocab_size)});
  return sets;
}

std::string fingerprint_of(const std::vector<HeldOutData>& sets) {
  std::string all;
  for (const HeldOutData& set : sets) all += set.data->fingerprint() + "\n";
  return all;
}

EvalResult together(const std::vector<HeldOutLoss>& losses) {
  if (losses.size() == 1) return losses.front().result;  // to the bit
  EvalResult all;
  for (const HeldOutLoss& of : losses) {
    all.loss += of.result.loss * static_cast<double>(of.result.tokens);
    all.tokens += of.result.tokens;
    all.seconds += of.result.seconds;
  }
  all.loss /= static_cast<double>(all.tokens);
  return all;
}

}  // namespace upmoe
