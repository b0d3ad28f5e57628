#include "launch/prompts.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <sstream>

#include "configs/json_reader.h"
#include "data/posix_file.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace {

constexpr std::uint64_t kFileLimit = std::uint64_t{1} << 30;

// A template that gets something else writes what it finds of it, and an answer to that comes without a word. A content
// may be a list of texts, and none where a turn calls a tool: the codec says what is wrong with those.
void check_turns(const nlohmann::json& turns, const std::string& where) {
  const auto is_turn = [](const nlohmann::json& turn) {
    if (!turn.is_object() || !turn.contains("role") || !turn["role"].is_string()) return false;
    if (turn.contains("tool_calls") && turn["tool_calls"].is_array()) return true;
    return turn.contains("content") && (turn["content"].is_string() || turn["content"].is_array());
  };
  if (!turns.is_array() || turns.empty() || !std::all_of(turns.begin(), turns.end(), is_turn))
    fail(ExitCode::kBadInput,
         "{}: messages: expected a list of turns, {{\"role\": \"user\", \"content\": TEXT}} each", where);
}

// With the line in the words of what is wrong.
template <class Body>
auto at(const std::string& where, Body&& body) {
  try {
    return body();
  } catch (const Error& e) {
    throw Error(e.code(), fmt::format("{}: {}", where, e.what()));
  }
}

// What a prompt cannot say, as other programs' requests do.
void tell_unknown(const JsonObject& object, const std::string& where) {
  for (const std::string& key : object.keys())
    if (key != "prompt" && key != "messages" && key != "tokens" && key != "tools" && key != "id")
      log::warn_once(
          "{}: '{}' means nothing in a prompt, and is passed over; options are those of the command", where,
          key);
}

std::vector<std::int32_t> tokens_of(const std::string& line, const std::string& where, const Encode& encode) {
  Problems problems;
  JsonObject object(line, where, problems);
  const bool text = object.has("prompt"), turns = object.has("messages"), tokens = object.has("tokens");
  if (text + turns + tokens != 1 && problems.empty())
    fail(ExitCode::kBadInput,
         "{}: one of \"prompt\" (text), \"messages\" (turns of a chat) and \"tokens\" (numbers) is needed",
         where);
  tell_unknown(object, where);
  const auto words = object.text("prompt", text);
  const auto numbers = object.integers("tokens", 0, std::numeric_limits<std::int32_t>::max());
  problems.throw_if_any(ExitCode::kBadInput, where);
  if (words) return at(where, [&] { return encode.text(*words); });
  if (turns) {
    nlohmann::json chat{{"messages", nlohmann::json::parse(object.as_text("messages"))}};
    check_turns(chat["messages"], where);
    if (object.has("tools")) chat["tools"] = nlohmann::json::parse(object.as_text("tools"));
    return at(where, [&] { return encode.chat(chat.dump()); });
  }
  return {numbers->begin(), numbers->end()};
}

}  // namespace

std::vector<Prompt> read_prompts(const std::filesystem::path& path, const Encode& encode) {
  std::istringstream file(read_text(path, kFileLimit));
  std::vector<Prompt> prompts;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = fmt::format("{}, line {}", path.string(), number);
    prompts.push_back({tokens_of(line, where, encode), static_cast<std::int64_t>(prompts.size())});
  }
  if (prompts.empty()) fail(ExitCode::kBadInput, "{}: no prompts", path.string());
  return prompts;
}

void share_prompts(Communicator& world, std::vector<Prompt>& prompts) {
  auto count = static_cast<std::int64_t>(prompts.size());
  world.broadcast(host_view(&count, {1}), 0);
  prompts.resize(static_cast<std::size_t>(count));
  std::vector<std::int64_t> sizes;
  std::vector<std::int32_t> tokens;
  std::int64_t total = 0;
  for (const Prompt& prompt : prompts) {
    sizes.push_back(static_cast<std::int64_t>(prompt.tokens.size()));
    tokens.insert(tokens.end(), prompt.tokens.begin(), prompt.tokens.end());
  }
  world.broadcast(host_view(sizes.data(), {count}), 0);
  for (const std::int64_t size : sizes) total += size;
  tokens.resize(static_cast<std::size_t>(total));
  world.broadcast(host_view(tokens.data(), {total}), 0);
  auto next = tokens.begin();
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    prompts[i].tokens.assign(next, next + sizes[i]);
    prompts[i].row = static_cast<std::int64_t>(i);
    next += sizes[i];
  }
}

}  // namespace upmoe
