#pragma once
// The dense models of one recipe: one, or several of one shape whose experts are mixed (branch-train-mix).

#include <deque>
#include <filesystem>
#include <span>
#include <vector>

#include "upcycle/dense_source.h"
#include "upcycle/source_survey.h"
#include "upcycle/transforms.h"

namespace upmoe {

class SourceSet {
 public:
  // Throws Error(kBadInput) as DenseSource does, and with what differs where a further model has another shape, element
  // type or number of layers than the first.
  explicit SourceSet(const std::vector<std::filesystem::path>& dirs, SourceKind kind = SourceKind::kDense);
  SourceSet(const SourceSet&) = delete;
  int size() const { return static_cast<int>(sources_.size()); }
  const DenseSource& at(int i) const { return sources_.at(static_cast<std::size_t>(i)); }
  const DenseSource& first() const { return sources_.front(); }
  // Collective; survey_of() and further() hold from then on. As survey_source().
  void survey(Communicator& comm, int threads, bool show_progress);
  const SourceSurvey& survey_of(int i) const { return surveys_.at(static_cast<std::size_t>(i)); }
  std::span<const FurtherSource> further() const { return further_; }

 private:
  std::deque<DenseSource> sources_;
  std::deque<SourceSurvey> surveys_;
  std::vector<FurtherSource> further_;
};

}  // namespace upmoe
