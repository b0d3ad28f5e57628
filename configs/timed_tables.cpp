#include "configs/timed_tables.h"

#include <fstream>

namespace upmoe {

void add_list(Schema& schema, const std::string& name, ReadItem read_item) {
  schema.key(
      name, "list", true,
      [read_item = std::move(read_item)](const YamlNode& list, const std::string& key, Problems& problems) {
        if (list.kind != YamlNode::Kind::kList) return problems.add(list.where, key + ": not a list");
        for (const YamlNode& item : list.items) read_item(item, problems);
      },
      [] { return std::string("[]"); });
}

void read_timed_tables(std::string_view yaml, const std::string& where, const ReadItem& read_table) {
  Problems problems;
  const YamlNode root = parse_yaml(yaml, where, problems);
  if (problems.empty()) {
    Schema schema;
    schema.section("");
    add_list(schema, "tables", read_table);
    schema.read(root, problems);
    schema.check_required(where, problems);
  }
  problems.throw_if_any(ExitCode::kUsage, where);
}

void write_timed_tables(const std::filesystem::path& file, std::string_view yaml) {
  std::ofstream out(file);
  out << yaml;
  if (!out.flush()) fail(ExitCode::kBadInput, "{}: cannot be written", file.string());
}

}  // namespace upmoe
