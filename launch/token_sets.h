#pragma once
// Token files that a command lets a model read: each a set of its own, with its sequences in the order of the file.

#include <filesystem>
#include <memory>
#include <vector>

#include "data/model_source.h"
#include "data/token_dataset.h"

namespace upmoe {

using TokenSets = std::vector<std::unique_ptr<TokenDataset>>;

struct TokenSetsRequest {
  std::vector<std::filesystem::path> files;
  std::int64_t seq_len = 0;
  bool loss_mask = false;  // targets that the files' masks leave out do not count
  bool warns = true;       // of tokenizers other than the model's; of several ranks one
};

// At least one file, of tokens that the model's vocabulary has; throws where one cannot be read.
TokenSets open_token_sets(const ModelSource& model, const TokenSetsRequest& request);

}  // namespace upmoe
