#include "configs/yaml_reader.h"

#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <system_error>

namespace upmoe {

YamlNode::YamlNode() = default;
YamlNode::YamlNode(const YamlNode& other) = default;
YamlNode::YamlNode(YamlNode&& other) noexcept = default;
YamlNode& YamlNode::operator=(const YamlNode& other) = default;
YamlNode& YamlNode::operator=(YamlNode&& other) noexcept = default;
YamlNode::~YamlNode() = default;
namespace {

// Thrown inside the parse when a limit is passed: going on would only produce follow-up problems.
struct LimitPassed {};

// Builds the tree from the parser's events, one finished node at a time. yaml-cpp's own tree would not do: it has no
// limits, and aliases in it cost nothing.
class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(std::string where, Problems& problems, const YamlLimits& limits)
      : where_(std::move(where)), problems_(problems), limits_(limits) {}

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    finish(make(YamlNode::Kind::kNull, mark), anchor);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    YamlNode node = make(YamlNode::Kind::kScalar, mark);
    if (tag != "?" && tag != "!" && !tag.empty()) refuse_tag(node.where, tag);
    node.quoted = tag == "!";
    node.text = value;
    finish(std::move(node), anchor);
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto it = anchored_.find(anchor);
    if (it == anchored_.end()) {
      problems_.add(at(mark), "an alias inside the value it stands for");
      throw LimitPassed{};
    }
    // An alias costs as much as what it stands for: ten lines of aliases to aliases would be a billion values.
    book(it->second.nodes, mark);
    add_to_parent(it->second.node, it->second.nodes);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::kList, mark, tag, anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::kMap, mark, tag, anchor);
  }
  void OnMapEnd() override { close(); }

  YamlNode take() { return std::move(root_); }

 private:
  struct Open {
    YamlNode node;
    YAML::anchor_t anchor = YAML::NullAnchor;
    std::vector<YamlNode> pending_key;  // holds the key of a map entry until its value is complete
    std::size_t nodes = 1;
  };
  struct Anchored {
    YamlNode node;
    std::size_t nodes = 1;
  };

  std::string at(const YAML::Mark& mark) const {
    return fmt::format("{}:{}:{}", where_, mark.line + 1, mark.column + 1);
  }
  void refuse_tag(const std::string& where, const std::string& tag) {
    problems_.add(where,
                  fmt::format("the tag {} is not accepted; a text that begins with ! needs quotes", tag));
  }
  void book(std::size_t nodes, const YAML::Mark& mark) {
    booked_ += nodes;
    if (booked_ <= limits_.nodes) return;
    problems_.add(at(mark),
                  fmt::format("more than {} values, aliases counted as what they stand for", limits_.nodes));
    throw LimitPassed{};
  }
  YamlNode make(YamlNode::Kind kind, const YAML::Mark& mark) {
    book(1, mark);
    YamlNode node;
    node.kind = kind;
    node.where = at(mark);
    return node;
  }
  void open(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    Open level;
    level.node = make(kind, mark);
    if (tag != "?" && tag != "!" && !tag.empty()) refuse_tag(level.node.where, tag);
    level.anchor = anchor;
    if (open_.size() >= limits_.depth) {
      problems_.add(level.node.where, fmt::format("nested deeper than {} levels", limits_.depth));
      throw LimitPassed{};
    }
    open_.push_back(std::move(level));
  }
  void close() {
    Open level = std::move(open_.back());
    open_.pop_back();
    finish(std::move(level.node), level.anchor, level.nodes);
  }
  void finish(YamlNode node, YAML::anchor_t anchor, std::size_t nodes = 1) {
    if (anchor != YAML::NullAnchor) anchored_[anchor] = {node, nodes};
    add_to_parent(std::move(node), nodes);
  }
  void add_to_parent(YamlNode node, std::size_t nodes) {
    if (open_.empty()) {
      root_ = std::move(node);
      return;
    }
    Open& parent = open_.back();
    parent.nodes += nodes;
    if (parent.node.kind == YamlNode::Kind::kList) {
      parent.node.items.push_back(std::move(node));
    } else if (parent.pending_key.empty()) {
      parent.pending_key.push_back(std::move(node));
    } else {
      add_entry(parent.node, std::move(parent.pending_key.back()), std::move(node));
      parent.pending_key.clear();
    }
  }
  void add_entry(YamlNode& map, YamlNode key, YamlNode value) {
    if (key.kind != YamlNode::Kind::kScalar) {
      problems_.add(key.where, "a key must be a plain word");
      return;
    }
    if (key.text == "<<") {
      problems_.add(key.where, "merge keys (<<) are not accepted; write the keys out");
      return;
    }
    for (const auto& [earlier, unused] : map.entries) {
      if (earlier.text != key.text) continue;
      problems_.add(key.where,
                    fmt::format("the key '{}' is given twice, first at {}", key.text, earlier.where));
      return;
    }
    map.entries.emplace_back(std::move(key), std::move(value));
    // Finding duplicates compares all pairs; no file of ours has a map this large.
    if (map.entries.size() > kMaxKeys) {
      problems_.add(map.where, fmt::format("a map of more than {} keys", kMaxKeys));
      throw LimitPassed{};
    }
  }

  static constexpr std::size_t kMaxKeys = 1000;
  std::string where_;
  Problems& problems_;
  YamlLimits limits_;
  std::size_t booked_ = 0;
  std::vector<Open> open_;
  std::map<YAML::anchor_t, Anchored> anchored_;
  YamlNode root_;
};

// Bytes that yaml-cpp would convert, or stop at, in silence. False when there is no point in parsing.
bool check_encoding(std::string_view text, const std::string& where, Problems& problems) {
  const auto starts = [&](std::string_view mark) { return text.substr(0, mark.size()) == mark; };
  if (starts("\xff\xfe") || starts("\xfe\xff")) {
    problems.add(where, "the file is UTF-16; save it as UTF-8");
    return false;
  }
  if (text.find('\0') != std::string_view::npos) {
    problems.add(where, "the file holds NUL bytes (UTF-16, or not a text file); save it as UTF-8");
    return false;
  }
  if (!is_valid_utf8(text)) {
    problems.add(where, "the file is not valid UTF-8");
    return false;
  }
  return true;
}

// The library's words for what the text at the mark usually is.
std::string words_for(const YAML::Exception& e, std::string_view text) {
  std::istringstream in{std::string(text)};
  std::string line;
  for (int number = 0; std::getline(in, line); ++number) {
    const std::size_t first = line.find_first_not_of(" \t");
    const bool tab = line.substr(0, std::min(first, line.size())).find('\t') != std::string::npos;
    if (tab && first != std::string::npos && line[first] != '#')
      return fmt::format("line {} is indented with a tab; YAML takes spaces alone", number + 1);
    if (number < e.mark.line) continue;
    const std::size_t column = static_cast<std::size_t>(std::max(e.mark.column, 0));
    const char at = column < line.size() ? line[column] : ' ';
    if (e.msg.find("anchor") != std::string::npos || e.msg.find("alias") != std::string::npos ||
        std::string_view("*&!%@`").find(at) != std::string_view::npos) {
      const std::string example = at == ' ' ? "'*'" : fmt::format("'{}...'", at);
      return fmt::format(
          "not valid YAML: {}; a text that begins with one of * & ! % @ ` needs quotes, such as {}", e.msg,
          example);
    }
    if (line.find("${") != std::string::npos)
      return fmt::format("not valid YAML: {}; between braces a text with ${{NAME}} in it needs quotes",
                         e.msg);
    if (e.msg.find("illegal map value") != std::string::npos)
      return fmt::format("not valid YAML: {}; one key a line, and a text with ': ' in it needs quotes",
                         e.msg);
    break;
  }
  return "not valid YAML: " + e.msg;
}

}  // namespace

void Problems::throw_if_any(ExitCode code, const std::string& what) const {
  if (list_.empty()) return;
  if (list_.size() == 1) throw Error(code, list_.front());
  constexpr std::size_t kShown = 50;
  std::string message = fmt::format("{}: {} problems", what, list_.size());
  for (std::size_t i = 0; i < std::min(list_.size(), kShown); ++i) message += "\n  " + list_[i];
  if (list_.size() > kShown) message += fmt::format("\n  and {} more", list_.size() - kShown);
  throw Error(code, message);
}

YamlNode parse_yaml(std::string_view text, const std::string& where, Problems& problems,
                    const YamlLimits& limits) {
  if (text.size() > limits.bytes) {
    problems.add(where, fmt::format("{} bytes, at most {} are read", text.size(), limits.bytes));
    return {};
  }
  if (!check_encoding(text, where, problems)) return {};
  TreeBuilder builder(where, problems, limits);
  try {
    std::istringstream in{std::string(text)};
    YAML::Parser parser(in);
    if (!parser.HandleNextDocument(builder)) {
      problems.add(where, "the file is empty");
      return {};
    }
    // A second document would be ignored in silence.
    YamlNode root = builder.take();
    TreeBuilder second(where, problems, limits);
    if (parser.HandleNextDocument(second)) problems.add(where, "holds more than one YAML document");
    return root;
  } catch (const LimitPassed&) {
    return {};  // the problem is in the list
  } catch (const YAML::Exception& e) {
    const std::string at =
        e.mark.is_null() ? where : fmt::format("{}:{}:{}", where, e.mark.line + 1, e.mark.column + 1);
    problems.add(at, words_for(e, text));
    return {};
  }
}

std::string read_text_file(const std::filesystem::path& file, std::size_t max_bytes) {
  std::error_code ec;
  const std::filesystem::file_status status = std::filesystem::status(file, ec);
  if (ec || !std::filesystem::exists(status)) fail(ExitCode::kUsage, "{}: no such file", file.string());
  if (!std::filesystem::is_regular_file(status)) {
    fail(ExitCode::kUsage, "{}: is not a regular file", file.string());
  }
  std::ifstream in(file, std::ios::binary);
  if (!in) fail(ExitCode::kUsage, "{}: cannot be opened for reading", file.string());
  std::string text(max_bytes + 1, '\0');  // one more than allowed tells too large from just fitting
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (in.bad()) fail(ExitCode::kUsage, "{}: reading failed", file.string());
  text.resize(static_cast<std::size_t>(in.gcount()));
  if (text.size() > max_bytes) {
    fail(ExitCode::kUsage, "{}: larger than {} bytes; is this the right file?", file.string(), max_bytes);
  }
  return text;
}

bool is_valid_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto byte = [&](std::size_t k) {
      return i + k < text.size() ? static_cast<unsigned>(static_cast<unsigned char>(text[i + k])) : 0u;
    };
    const unsigned first = byte(0);
    const std::size_t length = first < 0x80                    ? 1
                               : first >= 0xC2 && first < 0xE0 ? 2
                               : (first & 0xF0u) == 0xE0       ? 3
                               : first >= 0xF0 && first < 0xF5 ? 4
                                                               : 0;
    if (length == 0) return false;
    for (std::size_t k = 1; k < length; ++k) {
      if ((byte(k) & 0xC0u) != 0x80) return false;
    }
    // Overlong forms, surrogates, beyond U+10FFFF.
    const unsigned second = byte(1);
    if (first == 0xE0 && second < 0xA0) return false;
    if (first == 0xED && second >= 0xA0) return false;
    if (first == 0xF0 && second < 0x90) return false;
    if (first == 0xF4 && second >= 0x90) return false;
    i += length;
  }
  return true;
}

std::string yaml_quoted(std::string_view text) {
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '/' || c == '.' || c == '-';
  };
  bool safe = !text.empty() && text != "null" && text != "Null" && text != "NULL" && text[0] != '-';
  for (char c : text) safe = safe && plain(c);
  if (safe) return std::string(text);
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      out += fmt::format("\\x{:02x}", static_cast<unsigned>(static_cast<unsigned char>(c)));
    } else {
      out += c;
    }
  }
  return out + "\"";
}

}  // namespace upmoe
