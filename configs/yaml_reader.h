#pragma once
// A strict reader of small YAML files: text in, a plain tree with positions out. What YAML would let pass in
// silence (duplicate keys, merge keys, tags, UTF-16, several documents) is a problem; sizes, depth and the
// expansion of aliases are bounded, so that no input can make a walk over the tree long.

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/core/check.h"

namespace upmoe {

// Collects everything that is wrong, then throws once.
class Problems {
 public:
  void add(const std::string& where, const std::string& text) { list_.push_back(where + ": " + text); }
  void add(const std::string& text) { list_.push_back(text); }
  bool empty() const { return list_.empty(); }
  const std::vector<std::string>& list() const { return list_; }
  // One problem: its sentence. Several: "WHAT: n problems", then one line each. Nothing when there are none.
  void throw_if_any(ExitCode code, const std::string& what) const;

 private:
  std::vector<std::string> list_;
};

struct YamlNode {
  // Its own type stands in its members: what copies and destroys them is defined where the type is complete.
  YamlNode();
  YamlNode(const YamlNode& other);
  YamlNode(YamlNode&& other) noexcept;
  YamlNode& operator=(const YamlNode& other);
  YamlNode& operator=(YamlNode&& other) noexcept;
  ~YamlNode();

  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  std::string where;                                   // "file:line:column"
  std::string text;                                    // of a scalar
  bool quoted = false;                                 // a quoted scalar is text, never a number
  std::vector<YamlNode> items;                         // of a list
  std::vector<std::pair<YamlNode, YamlNode>> entries;  // of a map, in file order; keys are scalars
};

struct YamlLimits {
  std::size_t bytes = 1u << 20;
  std::size_t depth = 32;
  std::size_t nodes = 100'000;  // aliases counted as what they stand for
};

// Parses one document. Problems are added to `problems`; what could not be read is left out of the tree.
YamlNode parse_yaml(std::string_view text, const std::string& where, Problems& problems,
                    const YamlLimits& limits = {});
// The file's bytes. Throws Error(kUsage) when it cannot be read or is larger than the limit.
std::string read_text_file(const std::filesystem::path& file, std::size_t max_bytes = YamlLimits{}.bytes);

bool is_valid_utf8(std::string_view text);
std::string yaml_quoted(std::string_view text);  // the text as a YAML scalar, quoted where it must be

}  // namespace upmoe
