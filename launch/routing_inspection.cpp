#include "launch/routing_inspection.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <set>

#include "data/folder.h"
#include "data/model_source.h"
#include "data/staged_directory.h"
#include "kernels/core/log.h"
#include "launch/output.h"
#include "launch/python_tool.h"
#include "launch/text_codec.h"
#include "launch/token_sets.h"
#include "launch/whole_model.h"
#include "parallel/self_comm.h"
#include "trainer/routing_counts.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

std::int64_t sequences_of(const RoutingRequest& request, const TokenDataset& data) {
  return sequences_asked(request.sequences, data.num_sequences());
}

std::vector<std::int64_t> counts_of(const RoutingRequest& request, const TokenSets& sources,
                                    std::int64_t vocab) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(vocab), 0);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(request.seq_len)), targets(tokens.size());
  for (const auto& data : sources)
    for (std::int64_t i = 0; i < sequences_of(request, *data); ++i) {
      data->read(i, tokens, targets, {}, {});
      for (const std::int32_t token : tokens) ++counts[static_cast<std::size_t>(token)];
    }
  return counts;
}

TokenClasses classes_of(const ModelSource& model, const RoutingRequest& request, const TokenSets& sources) {
  const std::int64_t vocab = model.config().vocab_size;
  const fs::path tokenizer = model.companions() / "tokenizer.json";
  if (model.companions().empty() || !fs::is_regular_file(tokenizer))
    return frequency_bands(counts_of(request, sources, vocab));
  TextCodec codec(tokenizer);
  TextCodec::Classes found = codec.classes(vocab);
  return {std::move(found.names), std::move(found.of_token),
          "the text of each token, as " + tokenizer.string() + " has it"};
}

// Short where that tells them apart.
std::vector<std::string> names_of(const std::vector<std::string>& files) {
  std::vector<std::string> names;
  for (const std::string& file : files) names.push_back(fs::path(file).stem().string());
  return std::set<std::string>(names.begin(), names.end()).size() == names.size() ? names : files;
}

int write_results(const fs::path& folder, const std::string& counts) {
  make_folders(folder);
  const fs::path file = folder / "routing.json", picture = folder / "routing.png";
  replace_text(file, counts);
  const int status = run_python_tool("routing_picture.py", {"--", file.string(), picture.string()});
  if (status == 0) log::info("{} and {}", file.string(), picture.string());
  return status;
}

}  // namespace

int inspect_routing(const RoutingRequest& request, bool as_json) {
  const std::unique_ptr<ModelSource> source = open_model(request.model);
  const std::unique_ptr<Communicator> self = make_self_communicator();
  const std::vector<fs::path> files(request.tokens.begin(), request.tokens.end());
  const TokenSets sources = open_token_sets(*source, {.files = files, .seq_len = request.seq_len});
  RoutingCounts counts(source->config(), classes_of(*source, request, sources), request.seq_len);
  const std::unique_ptr<RankModel> model = whole_model(*source, *self, request.precision);
  const std::vector<std::string> names = names_of(request.tokens);
  for (std::size_t i = 0; i < sources.size(); ++i)
    counts.add_source(names[i], *model, *sources[i],
                      {.sequences = sequences_of(request, *sources[i]), .micro_batch = request.micro_batch});
  const std::string object = counts.as_json(request.model);
  print_result(as_json ? object : counts.summary());
  return request.out.empty() ? 0 : write_results(request.out, object);
}

}  // namespace upmoe
