#pragma once
// Token files that are given twice, under one name or two: as training data, or held out from what they train.

#include <string>
#include <vector>

#include "data/token_file.h"

namespace upmoe {

// One file, or two that say of themselves that they hold the same. Copies of a file without checksums are not known.
bool same_tokens(const TokenFile& one, const TokenFile& other);
// A sentence for each held-out file that is trained on, and for each training file that was there before. Both may be
// meant (a model that is to learn a text by heart, a source in two places of a blend), hence words and no refusal.
std::vector<std::string> repeated_files(const std::vector<const TokenFile*>& train,
                                        const std::vector<const TokenFile*>& held_out);

}  // namespace upmoe
