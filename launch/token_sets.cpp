#include "launch/token_sets.h"

#include "data/tokenizer_match.h"

namespace upmoe {

TokenSets open_token_sets(const ModelSource& model, const TokenSetsRequest& request) {
  TokenSets sets;
  std::vector<const TokenFile*> files;
  for (const std::filesystem::path& file : request.files) {
    sets.push_back(
        std::make_unique<TokenDataset>(std::vector<TokenDataset::Source>{{file, 1.0, request.loss_mask}},
                                       request.seq_len, false, 0, model.config().vocab_size));
    files.push_back(sets.back()->files().front());
  }
  if (request.warns) warn_of_tokenizers(model.companions(), files);
  return sets;
}

}  // namespace upmoe
