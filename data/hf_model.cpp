#include "data/hf_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "data/box_runs.h"
#include "data/folder.h"
#include "data/hf_files.h"
#include "data/stored_values.h"
#include "data/tensor_differences.h"
#include "kernels/core/log.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

// Reads runs of one tensor, given in the order of the file: neighbours there become one read, however they
// are scattered in `out` (gate and up interleave), and no read needs more than a small buffer.
class RunReader {
 public:
  RunReader(const SafetensorsFile& file, const SafetensorsEntry& entry, TensorView out)
      : file_(file), entry_(entry), out_(out), element_(stored_size(entry.dtype)) {}
  void add(std::int64_t from, std::int64_t to, std::int64_t n) {
    while (n > 0) {
      // A gap in the file, or a full buffer, ends the read that is being collected.
      if (!runs_.empty() && (from != end_ || end_ - runs_.front().from == kStaged)) flush();
      const std::int64_t begin = runs_.empty() ? from : runs_.front().from;
      const std::int64_t taken = std::min(n, kStaged - (from - begin));
      runs_.push_back({from, to, taken});
      end_ = from + taken;
      from += taken;
      to += taken;
      n -= taken;
    }
  }
  void flush() {
    if (runs_.empty()) return;
    const std::int64_t begin = runs_.front().from;
    staged_.resize(static_cast<std::size_t>(end_ - begin) * element_);
    file_.read(entry_, static_cast<std::uint64_t>(begin) * element_, staged_);
    for (const Run& r : runs_)
      convert_stored(staged_.data() + static_cast<std::size_t>(r.from - begin) * element_, entry_.dtype, r.n,
                     out_, r.to);
    runs_.clear();
  }

 private:
  static constexpr std::int64_t kStaged = std::int64_t{4} << 20;  // elements
  struct Run {
    std::int64_t from, to, n;
  };
  const SafetensorsFile& file_;
  const SafetensorsEntry& entry_;
  TensorView out_;
  std::size_t element_;
  std::vector<Run> runs_;
  std::int64_t end_ = 0;
  std::vector<std::byte> staged_;
};

Box with_last_dims_swapped(Box box) {
  const auto last = static_cast<std::size_t>(box.extent.rank) - 1;
  for (Shape* shape : {&box.offset, &box.extent}) std::swap(shape->dim[last - 1], shape->dim[last]);
  return box;
}

// Into `out`, which is `box`, the region that it shares with a part that lies the other way round on disk.
void read_transposed(const SafetensorsFile& file, const SafetensorsEntry& entry, const HfTensor& t,
                     const Box& box, TensorView out) {
  const Box region = intersect(t.part, box), on_disk = with_last_dims_swapped(region);
  UPMOE_CHECK(region.extent.rank == 3 && region.extent[0] == 1, "{}: {}", t.name, region.extent.str());
  const std::size_t size = size_of(out.dtype);
  std::vector<std::byte> staged(static_cast<std::size_t>(region.elements()) * size);
  RunReader reader(file, entry, TensorView{staged.data(), on_disk.extent, out.dtype, {}});
  for_runs(with_last_dims_swapped(t.part), on_disk, on_disk,
           [&](std::int64_t from, std::int64_t to, std::int64_t n) { reader.add(t.begin + from, to, n); });
  reader.flush();
  const std::int64_t rows = region.extent[1], columns = region.extent[2];
  for (std::int64_t r = 0; r < rows; ++r) {
    std::byte* row = out.data + static_cast<std::size_t>(flat_in(box, region, {0, r, 0, 0})) * size;
    for (std::int64_t c = 0; c < columns; ++c)
      std::memcpy(row + static_cast<std::size_t>(c) * size,
                  staged.data() + static_cast<std::size_t>(c * rows + r) * size, size);
  }
}

// Old versions of transformers saved what follows from the configuration.
bool is_derived(const std::string& name) {
  return name.ends_with(".rotary_emb.inv_freq");
}

}  // namespace

HfModel::HfModel(const fs::path& dir) : dir_(dir), config_(read_model_config(dir)) {
  if (config_.lora.given())
    fail(ExitCode::kBadInput,
         "{}: config.json speaks of adapters (upmoe_lora), which checkpoints have beside their "
         "weights and model directories have not; take the checkpoint, or remove the key",
         dir.string());
  const auto [names, file_of] = find_weight_files(dir);
  for (const std::string& name : names) {
    const fs::path real = fs::weakly_canonical(dir / name), folder = fs::weakly_canonical(dir);
    if (real.parent_path() != folder && !is_blob_of(real, folder))
      log::warning("{}: a link to {}", (dir / name).string(), real.string());
    files_.emplace_back(dir / name);
    const auto& entries = files_.back().header().entries;
    for (std::size_t e = 0; e < entries.size(); ++e)
      if (!index_.emplace(entries[e].name, std::pair(files_.size() - 1, e)).second)
        fail(ExitCode::kBadInput,
             "{}: tensor '{}' stands in {} and in another file; files of two models seem to be mixed, "
             "fetch it again",
             dir.string(), entries[e].name, name);
  }
  for (const HfTensor& t : hf_tensors_of(config_))
    if (!t.zeros) used_.insert(t.name);
  check_against(file_of, names);
  if (config_.tie_word_embeddings && index_.contains(tensor_name(config_, Role::kHead))) check_tied_head();
}

// Which of two different matrices is meant nobody can know: transformers 4 takes the embeddings, 5 the head.
void HfModel::check_tied_head() const {
  const std::string head_name = tensor_name(config_, Role::kHead),
                    embedding_name = tensor_name(config_, Role::kEmbedding);
  const auto [head_file, head] = locate(head_name);
  const auto [embedding_file, embedding] = locate(embedding_name);
  const auto values = [](const SafetensorsFile& file, const SafetensorsEntry& entry, std::int64_t from,
                         std::vector<float>& out) {
    const std::size_t element = stored_size(entry.dtype);
    std::vector<std::byte> stored(out.size() * element);
    file.read(entry, static_cast<std::uint64_t>(from) * element, stored);
    const auto n = static_cast<std::int64_t>(out.size());
    convert_stored(stored.data(), entry.dtype, n, host_view(out.data(), {n}), 0);
  };
  constexpr std::int64_t kBlock = std::int64_t{1} << 20;
  const std::int64_t elements = checked_mul(config_.vocab_size, config_.hidden_size);
  bool equal = head->shape == embedding->shape && is_stored_float(head->dtype);
  std::vector<float> a, b;
  for (std::int64_t at = 0; equal && at < elements; at += kBlock) {
    a.resize(static_cast<std::size_t>(std::min(kBlock, elements - at)));
    b.resize(a.size());
    values(*head_file, *head, at, a);
    values(*embedding_file, *embedding, at, b);
    equal = std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
  if (!equal)
    fail(ExitCode::kBadInput,
         "{}: config.json says tie_word_embeddings, but {} differs from {}; write \"tie_word_embeddings\": "
         "false to use it (as transformers 5 does), or remove it from the file (transformers 4 ignores it)",
         dir_.string(), head_name, embedding_name);
}

// Every difference between the files, the index and the config, in one message.
void HfModel::check_against(const std::map<std::string, std::string>& file_of,
                            const std::vector<std::string>& names) const {
  constexpr std::string_view kModel = "model.";
  const std::string embedding = tensor_name(config_, Role::kEmbedding),
                    head = tensor_name(config_, Role::kHead);
  if (embedding.starts_with(kModel) && index_.contains(embedding.substr(kModel.size())))
    fail(ExitCode::kBadInput,
         "{}: the names of the tensors lack 'model.': they were saved from the model without its head; "
         "load them with AutoModelForCausalLM of transformers and save that",
         dir_.string());
  // One tensor for the experts of a layer, where the family's published files have one for each.
  const auto joined = std::find_if(index_.begin(), index_.end(), [](const auto& entry) {
    return entry.first.ends_with(".experts.gate_up_proj") || entry.first.ends_with(".experts.down_proj");
  });
  const auto ours = hf_tensors_of(config_);
  if (joined != index_.end() &&
      std::none_of(ours.begin(), ours.end(), [&](const HfTensor& t) { return t.name == joined->first; }))
    fail(ExitCode::kBadInput,
         "{}: '{}' holds all experts of a layer, as transformers 5 has them inside; load the model there and "
         "save it "
         "with save_original_format=True, its default",
         dir_.string(), joined->first);
  TensorDifferences differences;
  for (const auto& [tensor, file] : file_of) {
    const auto it = index_.find(tensor);
    if (it == index_.end() || names[it->second.first] != file)
      differences.add(tensor, fmt::format("the index says {}, {}", file,
                                          it == index_.end() ? "no file holds it"
                                                             : "it is in " + names[it->second.first]));
  }
  for (const HfTensor& t : ours) {
    if (differences.expects(t.name)) continue;  // another part of it
    const auto it = index_.find(t.name);
    const bool there = it != index_.end();
    if (there || !t.zeros)
      differences.expect(t.name, t.shape,
                         there ? &files_[it->second.first].header().entries[it->second.second] : nullptr);
    if (there && !file_of.empty() && !file_of.contains(t.name))
      differences.add(t.name, "in a file but not in the index");
  }
  for (const auto& [name, place] : index_)
    if (!differences.expects(name) && !is_derived(name) && !(config_.tie_word_embeddings && name == head))
      differences.add(name, "not part of the model of config.json");
  differences.throw_if_any(
      fmt::format("{}: the files are not the model of config.json; both must be of one model as it was saved",
                  dir_.string()));
}

std::pair<const SafetensorsFile*, const SafetensorsEntry*> HfModel::locate(const std::string& tensor) const {
  const auto it = index_.find(tensor);
  if (it == index_.end()) fail(ExitCode::kBadInput, "{}: holds no tensor '{}'", dir_.string(), tensor);
  const SafetensorsFile& file = files_[it->second.first];
  return {&file, &file.header().entries[it->second.second]};
}

void HfModel::read(const ParamSpec& param, const Box& box, TensorView out) const {
  UPMOE_CHECK(contains(whole(param.shape), box) && out.elements() == box.elements(),
              "box {} + {} of {} {} into {}", box.offset.str(), box.extent.str(), param.name,
              param.shape.str(), out.shape.str());
  for (const HfTensor& t : hf_tensors_of(config_, param)) {
    const Box region = intersect(t.part, box);
    if (region.elements() == 0) continue;
    const auto [file, entry] = locate(t.name);
    if (t.transposed) {
      read_transposed(*file, *entry, t, box, out);
      continue;
    }
    RunReader reader(*file, *entry, out);
    for_runs(t.part, box, region,
             [&](std::int64_t from, std::int64_t to, std::int64_t n) { reader.add(t.begin + from, to, n); });
    reader.flush();
  }
}

std::uint64_t HfModel::data_bytes() const {
  std::uint64_t n = 0;
  for (const SafetensorsEntry* e : tensors()) n += e->end - e->begin;
  return n;
}

std::vector<const SafetensorsEntry*> HfModel::tensors() const {
  std::vector<const SafetensorsEntry*> all;
  for (const SafetensorsFile& f : files_)
    for (const SafetensorsEntry& e : f.header().entries) all.push_back(&e);
  return all;
}

}  // namespace upmoe
