#include "data/tokenizer_match.h"

#include <fmt/ranges.h>

#include <nlohmann/json.hpp>
#include <set>

#include "data/posix_file.h"
#include "data/sha256.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::uint64_t kTokenizerLimit = std::uint64_t{1} << 28, kConfigLimit = std::uint64_t{1} << 24;

bool says_which(const TokenFile& file) {
  return file.tokenizer_sha256().find_first_not_of('0') != std::string::npos;
}

// A short form of a digest that is still enough to compare by eye.
std::string brief(const std::string& digest) {
  return digest.substr(0, 12);
}

// Empty where there is none.
std::string digest_of_tokenizer(const fs::path& tokenizer) {
  return fs::is_regular_file(tokenizer) ? sha256(read_text(tokenizer, kTokenizerLimit)) : std::string();
}

void compare_with_model(const fs::path& dir, const std::vector<const TokenFile*>& files,
                        std::vector<std::string>& differences) {
  const fs::path tokenizer = dir / "tokenizer.json";
  const std::string digest = digest_of_tokenizer(tokenizer);
  const std::set<std::int64_t> ends = text_ends_of(dir);
  for (const TokenFile* file : files) {
    if (!digest.empty() && says_which(*file) && file->tokenizer_sha256() != digest)
      differences.push_back(
          fmt::format("{} was made with another tokenizer (sha256 {}...) than {} ({}...). If that is not the "
                      "same one written anew, its tokens mean other text to the model: make it anew with "
                      "data/tokenize.py --tokenizer {}",
                      file->path().string(), brief(file->tokenizer_sha256()), tokenizer.string(),
                      brief(digest), dir.string()));
    if (!ends.empty() && file->eos_id() >= 0 && !ends.contains(file->eos_id()))
      differences.push_back(
          fmt::format("documents of {} end with token {}, but eos_token_id of {} is {}: the model would not "
                      "learn where to stop",
                      file->path().string(), file->eos_id(), dir.string(), fmt::join(ends, ", ")));
  }
}

}  // namespace

std::set<std::int64_t> text_ends_of(const fs::path& dir) {
  std::set<std::int64_t> ends;
  if (dir.empty()) return ends;
  for (const char* name : {"config.json", "generation_config.json"}) {
    if (!fs::is_regular_file(dir / name)) continue;
    ends.merge(text_ends_in(read_text(dir / name, kConfigLimit)));
  }
  return ends;
}

std::set<std::int64_t> text_ends_in(const std::string& json) {
  std::set<std::int64_t> ends;
  const auto config = nlohmann::json::parse(json, nullptr, false);
  if (!config.is_object() || !config.contains("eos_token_id")) return ends;
  const auto& id = config["eos_token_id"];
  for (const auto& one : id.is_array() ? id : nlohmann::json::array({id}))
    if (one.is_number_integer()) ends.insert(one.get<std::int64_t>());
  return ends;
}

std::vector<std::string> unfollowed_settings(const fs::path& dir) {
  // With the value that asks for nothing.
  static const std::pair<const char*, nlohmann::json> kFollowed[] = {
      {"repetition_penalty", 1.0},
      {"encoder_repetition_penalty", 1.0},
      {"no_repeat_ngram_size", 0},
      {"encoder_no_repeat_ngram_size", 0},
      {"num_beams", 1},
      {"num_beam_groups", 1},
      {"diversity_penalty", 0.0},
      {"penalty_alpha", 0.0},
      {"min_new_tokens", 0},
      {"min_length", 0},
      {"bad_words_ids", nullptr},
      {"suppress_tokens", nullptr},
      {"sequence_bias", nullptr},
      {"begin_suppress_tokens", nullptr},
      {"guidance_scale", 1.0},
      {"exponential_decay_length_penalty", nullptr},
      {"forced_bos_token_id", nullptr},
      {"forced_eos_token_id", nullptr}};
  std::vector<std::string> found;
  const fs::path file = dir / "generation_config.json";
  if (dir.empty() || !fs::is_regular_file(file)) return found;
  const auto settings = nlohmann::json::parse(read_text(file, kConfigLimit), nullptr, false);
  if (!settings.is_object()) return {"what stands there: it is no JSON object"};
  for (const auto& [name, nothing] : kFollowed)
    if (const auto it = settings.find(name); it != settings.end() && !it->empty() && *it != nothing)
      found.push_back(fmt::format("{} {}", name, it->dump()));
  return found;
}

std::string teacher_tokenizer_difference(const fs::path& model_dir, const fs::path& teacher_dir) {
  if (model_dir.empty() || teacher_dir.empty()) return "";
  const fs::path model = model_dir / "tokenizer.json", teacher = teacher_dir / "tokenizer.json";
  const std::string one = digest_of_tokenizer(model), other = digest_of_tokenizer(teacher);
  if (one.empty() || other.empty() || one == other) return "";
  return fmt::format(
      "train.teacher: {} (sha256 {}...) is another tokenizer than {} ({}...). If that is not the same one "
      "written anew, what the teacher says of a token is of another one: take a model with the same "
      "tokenizer",
      teacher.string(), brief(other), model.string(), brief(one));
}

std::vector<std::string> tokenizer_differences(const fs::path& model_dir,
                                               const std::vector<const TokenFile*>& files) {
  std::vector<std::string> differences;
  if (!model_dir.empty()) compare_with_model(model_dir, files, differences);
  const TokenFile* first = nullptr;
  for (const TokenFile* file : files) {
    if (!says_which(*file)) continue;
    if (first == nullptr) first = file;
    if (file->tokenizer_sha256() != first->tokenizer_sha256())
      differences.push_back(fmt::format(
          "{} and {} were made with different tokenizers (sha256 {}... and {}...): make one of them anew",
          first->path().string(), file->path().string(), brief(first->tokenizer_sha256()),
          brief(file->tokenizer_sha256())));
  }
  return differences;
}

std::string unknown_tokenizers(const fs::path& model_dir, const std::vector<const TokenFile*>& files) {
  if (model_dir.empty() || !fs::is_regular_file(model_dir / "tokenizer.json")) return "";
  const TokenFile* first = nullptr;
  std::size_t others = 0;
  for (const TokenFile* file : files) {
    if (says_which(*file)) continue;
    if (first == nullptr) {
      first = file;
    } else {
      ++others;
    }
  }
  if (first == nullptr) return "";
  return fmt::format("{} does not say which tokenizer made it{}; whether it was {} is not checked",
                     first->path().string(), others == 0 ? "" : fmt::format(", as {} more do not", others),
                     (model_dir / "tokenizer.json").string());
}

void warn_of_tokenizers(const fs::path& model_dir, const std::vector<const TokenFile*>& files) {
  for (const std::string& words : tokenizer_differences(model_dir, files)) log::warning("{}", words);
  if (const std::string words = unknown_tokenizers(model_dir, files); !words.empty()) log::info("{}", words);
}

}  // namespace upmoe
