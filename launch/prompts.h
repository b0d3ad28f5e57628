#pragma once
// What `upmoe generate` goes on from.

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "parallel/communicator.h"
#include "trainer/generation.h"

namespace upmoe {

// Text to tokens; throws where the model has no tokenizer.
struct Encode {
  std::function<std::vector<std::int32_t>(const std::string& text)> text;
  std::function<std::vector<std::int32_t>(const std::string& json)> chat;  // TextCodec::encode_chat
};

// One prompt a line, an object with "prompt" (text), "messages" (turns of a chat, perhaps with "tools") or "tokens"
// (numbers); empty lines are left out. Throws Error(kBadInput) with the line.
std::vector<Prompt> read_prompts(const std::filesystem::path& path, const Encode& encode);

// Those of rank 0, on every rank. Collective.
void share_prompts(Communicator& world, std::vector<Prompt>& prompts);

}  // namespace upmoe
