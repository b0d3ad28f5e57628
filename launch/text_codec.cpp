#include "launch/text_codec.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/core/check.h"
#include "launch/python.h"

namespace upmoe {

namespace {

struct Pipe {
  Pipe() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0)
      fail(ExitCode::kFailure, "a pipe to the tokenizer: {}", std::strerror(errno));
    read = ends[0];
    write = ends[1];
  }
  int read = -1, write = -1;
};

}  // namespace

TextCodec::TextCodec(const std::filesystem::path& tokenizer) : tokenizer_(tokenizer) {
  const std::string python = find_python(),
                    script = script_of_source("data/text_codec.py", "text in prompts and answers").string(),
                    file = tokenizer.string();
  const Pipe questions, answers;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, questions.read, STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, answers.write, STDOUT_FILENO);
  std::vector<std::string> words{python, script, file};
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const int error = posix_spawnp(&child_, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(questions.read);
  close(answers.write);
  to_ = fdopen(questions.write, "w");
  from_ = fdopen(answers.read, "r");
  if (error == 0) return;
  std::fclose(to_);
  std::fclose(from_);
  fail(ExitCode::kFailure, "cannot start {}: {}; run launch/setup.sh, or set UPMOE_PYTHON", python,
       std::strerror(error));
}

TextCodec::~TextCodec() {
  std::fclose(to_);  // the end of its input is its end
  std::fclose(from_);
  while (waitpid(child_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

// One line there, one line back.
std::string TextCodec::ask(const std::string& question) {
  const std::string line = question + "\n";
  if (std::fwrite(line.data(), 1, line.size(), to_) == line.size()) std::fflush(to_);
  std::string answer;
  char part[4096];
  while (std::fgets(part, sizeof part, from_) != nullptr) {
    answer += part;
    if (answer.back() == '\n') return answer;
  }
  fail(ExitCode::kFailure, "the program that reads {} ended without an answer", tokenizer_.string());
}

namespace {

nlohmann::json read_answer(const std::string& line, const std::string& tokenizer) {
  nlohmann::json answer = nlohmann::json::parse(line, nullptr, false);
  if (!answer.is_object()) fail(ExitCode::kFailure, "{}: the tokenizer answered '{}'", tokenizer, line);
  if (answer.contains("error")) {
    const bool usage = answer.value("status", 0) == static_cast<int>(ExitCode::kUsage);  // no package for it
    fail(usage ? ExitCode::kUsage : ExitCode::kBadInput, "{}", answer["error"].get<std::string>());
  }
  return answer;
}

std::string question_of(const char* what, const nlohmann::json& value) {
  try {
    return nlohmann::json{{what, value}}.dump(-1, ' ', /*ensure_ascii=*/true);
  } catch (const nlohmann::json::exception&) {
    fail(ExitCode::kBadInput, "the prompt is not text in UTF-8");
  }
}

}  // namespace

std::vector<std::int32_t> TextCodec::encode(const std::string& text) {
  return read_answer(ask(question_of("encode", text)), tokenizer_.string())
      .at("tokens")
      .get<std::vector<std::int32_t>>();
}

std::vector<std::int32_t> TextCodec::encode_chat(const std::string& chat) {
  return read_answer(ask(question_of("chat", nlohmann::json::parse(chat))), tokenizer_.string())
      .at("tokens")
      .get<std::vector<std::int32_t>>();
}

std::string TextCodec::decode(std::span<const std::int32_t> tokens) {
  const std::vector<std::int32_t> all(tokens.begin(), tokens.end());
  return read_answer(ask(question_of("decode", all)), tokenizer_.string()).at("text").get<std::string>();
}

TextCodec::Classes TextCodec::classes(std::int64_t vocab) {
  const nlohmann::json answer = read_answer(ask(question_of("classes", vocab)), tokenizer_.string());
  return {answer.at("names").get<std::vector<std::string>>(), answer.at("classes").get<std::vector<int>>()};
}

}  // namespace upmoe
