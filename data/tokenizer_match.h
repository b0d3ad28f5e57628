#pragma once
// Token files say which tokenizer made them and which token ends documents; a model directory holds its own.

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "data/token_dataset.h"

namespace upmoe {

// One sentence for each token file that was made with another tokenizer than `model_dir`/tokenizer.json or
// than the other files, or whose documents end with a token that does not end text for the model. Differences
// may be harmless (a tokenizer.json written anew has another digest), hence words and no refusal. What does
// not say (no tokenizer.json, a digest of zeros, eos_id -1) is passed over. `model_dir` may be empty.
std::vector<std::string> tokenizer_differences(const std::filesystem::path& model_dir,
                                               const std::vector<const TokenFile*>& files);
// A sentence for all files without a digest where the model has a tokenizer.json, with which they cannot be compared;
// empty where there is nothing to say. `model_dir` may be empty.
std::string unknown_tokenizers(const std::filesystem::path& model_dir,
                               const std::vector<const TokenFile*>& files);
// The same, in the log: differences as warnings.
void warn_of_tokenizers(const std::filesystem::path& model_dir, const std::vector<const TokenFile*>& files);

// In words, that tokenizer.json of the two folders differ, of a model and of the teacher that it learns from; as above,
// and empty where they do not or one has none. Both may be empty.
std::string teacher_tokenizer_difference(const std::filesystem::path& model_dir,
                                         const std::filesystem::path& teacher_dir);

// The tokens that end text for the model in this folder: eos_token_id, a number or several, of its config.json and of
// its generation_config.json together. `model_dir` may be empty.
std::set<std::int64_t> text_ends_of(const std::filesystem::path& model_dir);
// Of the text of one such file.
std::set<std::int64_t> text_ends_in(const std::string& json);
// What generation_config.json of this folder asks for beside sampling that transformers' generate() follows without
// sampling as well, and this program does not: "repetition_penalty 1.05", each by its name. In words what is wrong with
// the file, where it is no JSON. `model_dir` may be empty.
std::vector<std::string> unfollowed_settings(const std::filesystem::path& model_dir);

}  // namespace upmoe
