#pragma once
// From recipe lines to bytes.

#include <cstddef>
#include <cstdint>
#include <span>

#include "upcycle/dense_source.h"
#include "upcycle/recipe.h"
#include "upcycle/source_survey.h"
#include "upcycle/unit_map.h"

namespace upmoe {

// A dense model behind the first one, of the same shape.
struct FurtherSource {
  const DenseSource& source;
  const SourceSurvey& survey;
};

struct FillContext {
  const DenseSource& source;
  const SourceSurvey& survey;  // moments of the source matrices
  const PermutationCache& permutations;
  std::uint64_t seed;
  std::span<const FurtherSource> further = {};
  // Of dense model i, the first one being 0.
  const DenseSource& source_of(int i) const {
    return i == 0 ? source : further[static_cast<std::size_t>(i - 1)].source;
  }
  const SourceSurvey& survey_of(int i) const {
    return i == 0 ? survey : further[static_cast<std::size_t>(i - 1)].survey;
  }
};

// Rows [begin, end) of the line's tensor in the source's element type; out: their bytes. The value
// of an element depends only on (line, seed, row, column): any split into row ranges gives the same
// bytes. Safe for several threads.
void fill(const RecipeLine& line, std::int64_t begin, std::int64_t end, const FillContext& context,
          std::span<std::byte> out);

// Bytes [begin, end) of the line's tensor, at element boundaries; cuts through rows cost those rows once more.
void fill_bytes(const RecipeLine& line, std::uint64_t begin, std::uint64_t end, const FillContext& context,
                std::span<std::byte> out);

}  // namespace upmoe
