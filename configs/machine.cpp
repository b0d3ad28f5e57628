#include "configs/machine.h"

#include "configs/schema.h"

namespace upmoe {

namespace {

Schema schema_of(Machine& m) {
  const NumberCheck positive{.least = 0, .above = true, .required = true};
  Schema schema;
  schema.section("")
      .key("name", m.name, TextCheck{.required = true})
      .key("source", m.source, TextCheck{.required = true})
      .key("bf16_tflops", m.bf16_tflops, positive)
      .key("memory_gb", m.memory_gb, positive)
      .key("memory_gb_per_s", m.memory_gb_per_s, positive);
  return schema;
}

}  // namespace

Machine read_machine(const std::filesystem::path& file) {
  Machine machine;
  Schema schema = schema_of(machine);
  Problems problems;
  const YamlNode root = parse_yaml(read_text_file(file), file.string(), problems);
  schema.read(root, problems);
  schema.check_required(file.string(), problems);
  problems.throw_if_any(ExitCode::kUsage, file.string());
  return machine;
}

}  // namespace upmoe
