#include "upcycle/source_set.h"

#include <nlohmann/json.hpp>
#include <string>

#include "data/model_source.h"

namespace upmoe {
namespace {

// "vocab_size: 48 and 50; ..." of two configurations; empty: they are one shape.
std::string differences(const ModelConfig& first, const ModelConfig& other) {
  const auto a = nlohmann::json::parse(function_of(first)), b = nlohmann::json::parse(function_of(other));
  std::string all;
  const auto add = [&](const std::string& key) {
    const auto text = [&](const nlohmann::json& j) { return j.contains(key) ? j.at(key).dump() : "absent"; };
    all += fmt::format("{}{}: {} and {}", all.empty() ? "" : "; ", key, text(a), text(b));
  };
  for (const auto& [key, value] : a.items())
    if (!b.contains(key) || b.at(key) != value) add(key);
  for (const auto& [key, value] : b.items())
    if (!a.contains(key)) add(key);
  return all;
}

}  // namespace

SourceSet::SourceSet(const std::vector<std::filesystem::path>& dirs, SourceKind kind) {
  for (const std::filesystem::path& dir : dirs) sources_.emplace_back(dir, kind);
  for (const DenseSource& source : sources_) {
    std::string other = differences(first().model().config(), source.model().config());
    if (other.empty() && source.dtype() != first().dtype())
      other = fmt::format("tensors in {} and {}", name_of(first().dtype()), name_of(source.dtype()));
    if (!other.empty())
      fail(ExitCode::kBadInput,
           "{} and {} cannot be the dense models of one mixture, which must be of one shape: {}",
           first().model().dir().string(), source.model().dir().string(), other);
  }
}

void SourceSet::survey(Communicator& comm, int threads, bool show_progress) {
  for (const DenseSource& source : sources_)
    surveys_.push_back(survey_source(source, comm, threads, show_progress));
  for (std::size_t i = 1; i < sources_.size(); ++i) further_.push_back({sources_[i], surveys_[i]});
}

}  // namespace upmoe
