#include "launch/text_table.h"

#include <algorithm>

#include "kernels/core/check.h"

namespace upmoe {

void TextTable::row(std::vector<std::string> cells) {
  UPMOE_CHECK(cells.size() == columns_.size(), "{} cells of {}", cells.size(), columns_.size());
  rows_.push_back(std::move(cells));
}

std::string TextTable::str() const {
  std::vector<std::size_t> widths;
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    std::size_t width = std::max<std::size_t>(2, columns_[i].head.size());
    for (const auto& cells : rows_) width = std::max(width, cells[i].size());
    widths.push_back(width);
  }
  std::string out;
  const auto line = [&](auto cell) {
    for (std::size_t i = 0; i < columns_.size(); ++i)
      out += columns_[i].align == Align::kLeft ? fmt::format("| {:<{}} ", cell(i), widths[i])
                                               : fmt::format("| {:>{}} ", cell(i), widths[i]);
    out += "|\n";
  };
  line([&](std::size_t i) { return columns_[i].head; });
  line([&](std::size_t i) {
    return columns_[i].align == Align::kLeft ? std::string(widths[i], '-')
                                             : std::string(widths[i] - 1, '-') + ":";
  });
  for (const auto& cells : rows_) line([&](std::size_t i) { return cells[i]; });
  return out;
}

}  // namespace upmoe
