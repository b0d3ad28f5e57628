#pragma once
// A table for people, in the form that Markdown reads as well.

#include <string>
#include <vector>

namespace upmoe {

class TextTable {
 public:
  enum class Align { kLeft, kRight };
  struct Column {
    std::string head;
    Align align = Align::kRight;
  };
  explicit TextTable(std::vector<Column> columns) : columns_(std::move(columns)) {}
  void row(std::vector<std::string> cells);  // one for each column
  std::string str() const;                   // ends with a line break

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace upmoe
