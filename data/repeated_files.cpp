#include "data/repeated_files.h"

#include <fmt/format.h>

#include <filesystem>
#include <system_error>

namespace upmoe {

namespace {

// The first of `files` with the same tokens; as many as there are: none.
std::size_t place_of(const TokenFile& file, const std::vector<const TokenFile*>& files) {
  std::size_t i = 0;
  while (i < files.size() && !same_tokens(*files[i], file)) ++i;
  return i;
}

}  // namespace

bool same_tokens(const TokenFile& one, const TokenFile& other) {
  std::error_code unknown;  // then they are not known to be one
  if (std::filesystem::equivalent(one.path(), other.path(), unknown)) return true;
  // Lengths beside the checksum, which has 32 bits.
  return one.checksummed() && other.checksummed() && one.identity() == other.identity() &&
         one.num_tokens() == other.num_tokens() && one.document_ends() == other.document_ends();
}

std::vector<std::string> repeated_files(const std::vector<const TokenFile*>& train,
                                        const std::vector<const TokenFile*>& held_out) {
  std::vector<std::string> sentences;
  for (const TokenFile* file : held_out)
    if (const std::size_t i = place_of(*file, train); i < train.size())
      sentences.push_back(
          fmt::format("{} is held out, but has the tokens of data.train[{}] ({}): its loss will be that of "
                      "text which the model was trained on",
                      file->path().string(), i, train[i]->path().string()));
  for (std::size_t i = 1; i < train.size(); ++i)
    if (const std::size_t first = place_of(*train[i], train); first < i)
      sentences.push_back(
          fmt::format("data.train[{}] ({}) has the tokens of data.train[{}] ({}), and both go through "
                      "them by themselves",
                      i, train[i]->path().string(), first, train[first]->path().string()));
  return sentences;
}

}  // namespace upmoe
