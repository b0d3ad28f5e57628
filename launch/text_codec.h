#pragma once
// Text to tokens and back by a model's own tokenizer, which is Python's work (data/text_codec.py): a program beside
// this one, asked over pipes.

#include <sys/types.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace upmoe {

class TextCodec {
 public:
  // Starts it with this tokenizer.json. What is wrong with that is said by the first question.
  explicit TextCodec(const std::filesystem::path& tokenizer);
  ~TextCodec();
  TextCodec(const TextCodec&) = delete;

  // Throw Error(kBadInput) with the tokenizer's words.
  std::vector<std::int32_t> encode(const std::string& text);
  // Of a JSON object with "messages", a list of {"role": ..., "content": TEXT}, and perhaps "tools", by the model's
  // chat template, up to the answer.
  std::vector<std::int32_t> encode_chat(const std::string& chat);
  std::string decode(std::span<const std::int32_t> tokens);
  // The tokens for single bytes, where a run of them is decoded as one.
  std::set<std::int32_t> byte_tokens();
  // What the first `vocab` tokens are made of: letters, digits and so on. The last of the names is for what is none of
  // the others.
  struct Classes {
    std::vector<std::string> names;
    std::vector<int> of_token;
  };
  Classes classes(std::int64_t vocab);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  using File = std::unique_ptr<std::FILE, Close>;
  struct Pipe;
  std::string ask(const std::string& question);

  std::filesystem::path tokenizer_;
  File to_, from_;
  pid_t child_ = 0;
};

}  // namespace upmoe
