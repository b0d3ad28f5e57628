#include "launch/text_codec.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/core/check.h"
#include "launch/python.h"

namespace upmoe {

// Both ends as files, each closed whatever comes.
struct TextCodec::Pipe {
  Pipe() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) refuse();
    read.reset(fdopen(ends[0], "r"));
    write.reset(fdopen(ends[1], "w"));
    if (read && write) return;
    const int error = errno;
    if (!read) close(ends[0]);
    if (!write) close(ends[1]);
    errno = error;
    refuse();
  }
  [[noreturn]] static void refuse() {
    fail(ExitCode::kFailure, "a pipe to the tokenizer: {}", std::strerror(errno));
  }
  File read, write;
};

TextCodec::TextCodec(const std::filesystem::path& tokenizer) : tokenizer_(tokenizer) {
  const std::filesystem::path script = script_of_source("data/text_codec.py", "text in prompts and answers");
  Pipe questions, answers;
  child_ = spawn_python(
      {script.string(), tokenizer.string()},
      {{fileno(questions.read.get()), STDIN_FILENO}, {fileno(answers.write.get()), STDOUT_FILENO}});
  to_ = std::move(questions.write);
  from_ = std::move(answers.read);
}

TextCodec::~TextCodec() {
  to_.reset();  // the end of its input is its end
  from_.reset();
  while (waitpid(child_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

// One line there, one line back.
std::string TextCodec::ask(const std::string& question) {
  const std::string line = question + "\n";
  if (std::fwrite(line.data(), 1, line.size(), to_.get()) == line.size()) std::fflush(to_.get());
  std::string answer;
  char part[4096];
  while (std::fgets(part, sizeof part, from_.get()) != nullptr) {
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

std::set<std::int32_t> TextCodec::byte_tokens() {
  return read_answer(ask(question_of("bytes", true)), tokenizer_.string())
      .at("tokens")
      .get<std::set<std::int32_t>>();
}

TextCodec::Classes TextCodec::classes(std::int64_t vocab) {
  const nlohmann::json answer = read_answer(ask(question_of("classes", vocab)), tokenizer_.string());
  return {answer.at("names").get<std::vector<std::string>>(), answer.at("classes").get<std::vector<int>>()};
}

}  // namespace upmoe
