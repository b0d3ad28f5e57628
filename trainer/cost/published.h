#pragma once
// What was printed about models, to be laid beside what is computed: the table of the Qwen1.5-MoE announcement (March
// 2024), and what model cards and reports of other models say. Cells stand as they were printed; what is wrong
// with one is computed, not claimed.

#include <array>
#include <span>
#include <string>
#include <string_view>

#include "configs/param_table.h"

namespace upmoe {

// Billions of parameters, in the decimals they were printed with; empty where nothing was.
struct PublishedCells {
  const char* total = "";
  const char* activated = "";
  const char* activated_non_embedding = "";
};

struct PublishedModel {
  const char* file;  // in configs/models, without .json
  const char* label;
  bool announced;  // a row of the announcement's table
  PublishedCells cells;
  const char* note = "";  // what else is known of the cells
};

std::span<const PublishedModel> published_models();
const PublishedModel& published_model(std::string_view file);

// How a printed number came from the computed one.
enum class Agreement { kNothingPrinted, kRounded, kCut, kDiffers };
Agreement agreement(const std::string& printed, double billions);

// One sentence about the row: "agrees", or which cells do not round to what was printed, and how they came about.
std::string remark(const PublishedModel& model, const ParamCounts& computed);

}  // namespace upmoe
