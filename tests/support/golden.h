#pragma once
// The golden files of tests/golden as this project's types. See tests/golden/README.md for what they hold.

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "configs/run_config.h"
#include "data/hf_model.h"
#include "data/safetensors.h"
#include "tests/support/token_file.h"
#include "trainer/session.h"

namespace upmoe::test {

class Golden {
 public:
  explicit Golden(const std::string& name)
      : file_(folder() / (name + ".safetensors")),
        config_(read_model_config(folder() / name / "config.json")) {
    const std::vector<std::int32_t> rows = values<std::int32_t>("tokens");
    const SafetensorsEntry& e = entry("tokens");
    rows_ = e.shape[0];
    seq_len_ = e.shape[1] - 1;
    // The rows overlap by one token: together they are one stream.
    for (std::int64_t r = 0; r < rows_; ++r)
      for (std::int64_t s = 0; s < seq_len_; ++s)
        stream_.push_back(static_cast<std::uint32_t>(rows[static_cast<std::size_t>(r * (seq_len_ + 1) + s)]));
    stream_.push_back(static_cast<std::uint32_t>(rows.back()));
  }
  static std::filesystem::path folder() { return std::filesystem::path(UPMOE_SOURCE_DIR) / "tests/golden"; }

  const ModelConfig& config() const { return config_; }
  std::int64_t seq_len() const { return seq_len_; }
  double number(const std::string& key) const { return std::stod(file_.header().metadata.at(key)); }

  template <class T>
  std::vector<T> values(const std::string& name) const {
    const SafetensorsEntry& e = entry(name);
    std::vector<T> v((e.end - e.begin) / sizeof(T));
    file_.read(e, 0, std::as_writable_bytes(std::span(v)));
    return v;
  }
  bool has(const std::string& name) const { return file_.find(name) != nullptr; }

  // A parameter in its global shape, from the tensors `prefix` + Hugging Face name.
  std::vector<float> parameter(const ParamSpec& spec, const std::string& prefix) const {
    std::vector<float> whole(static_cast<std::size_t>(spec.shape.elements()));
    for (const HfTensor& t : hf_tensors_of(config_, spec)) {
      scatter(part_of(values<float>(prefix + t.name), t), t.part, spec.shape, whole);
    }
    return whole;
  }
  // Fills a ParamStore: any box of a parameter.
  ReadParam reader() const {
    return [this](const ParamSpec& spec, const Box& box, TensorView out) {
      const std::vector<float> whole = parameter(spec, "");
      std::int64_t i = 0;
      for_each_index(box, spec.shape,
                     [&](std::int64_t at) { out.as<float>()[i++] = whole[static_cast<std::size_t>(at)]; });
    };
  }

  // Calls f(flat global index) for the elements of `box`, row-major.
  template <class F>
  static void for_each_index(const Box& box, const Shape& global, const F& f) {
    const std::int64_t n = box.elements(), width = global.rank > 0 ? box.extent[global.rank - 1] : 1;
    for (std::int64_t i = 0; i < n; i += width) {  // where the last dimension begins anew
      std::int64_t rest = i, at = 0, stride = 1;
      for (int d = global.rank - 1; d >= 0; --d) {
        at += (box.offset[d] + rest % box.extent[d]) * stride;
        rest /= box.extent[d];
        stride *= global[d];
      }
      for (std::int64_t j = 0; j < width; ++j) f(at + j);
    }
  }

  // The run that the file's ten steps are, reading its tokens from `tokens_path` (written here).
  RunConfig run(const std::filesystem::path& tokens_path, std::int64_t micro_batch, int ep) const {
    write_tokens(tokens_path);
    return settings(tokens_path, micro_batch, ep);
  }
  void write_tokens(const std::filesystem::path& path, std::span<const std::uint8_t> loss_mask = {}) const {
    write_token_file(path, stream_, {}, config_.vocab_size, -1, std::string(64, '0'), loss_mask);
  }
  std::size_t stream_size() const { return stream_.size(); }
  // The same, writing nothing.
  RunConfig settings(const std::filesystem::path& tokens_path, std::int64_t micro_batch, int ep) const {
    RunConfig run;
    run.run.dir = "unused";
    run.data.train = {{tokens_path.string(), 1.0}};
    run.data.seq_len = seq_len_;
    run.data.shuffle = false;
    run.train.steps = 10;
    run.train.global_batch = 4;
    run.train.micro_batch = micro_batch;
    run.router.aux_loss = {config_.num_experts > 0 ? number("aux_coef") : 0.0};
    run.optimizer.lr = number("lr");
    run.optimizer.beta1 = number("beta1");
    run.optimizer.beta2 = number("beta2");
    run.optimizer.eps = number("eps");
    run.optimizer.weight_decay = number("weight_decay");
    run.optimizer.clip = number("clip");
    run.schedule.name = ScheduleKind::kConstant;
    run.parallel.ep = ep;
    return run;
  }

 private:
  // Row-major as `t.part`, out of the tensor on disk.
  static std::vector<float> part_of(const std::vector<float>& tensor, const HfTensor& t) {
    const auto begin = tensor.begin() + t.begin;
    const std::vector<float> stored(begin, begin + t.part.elements());
    if (!t.transposed) return stored;
    const auto rows = static_cast<std::size_t>(t.part.extent[1]),
               columns = static_cast<std::size_t>(t.part.extent[2]);
    std::vector<float> part(stored.size());
    for (std::size_t r = 0; r < rows; ++r)
      for (std::size_t c = 0; c < columns; ++c) part[r * columns + c] = stored[c * rows + r];
    return part;
  }
  const SafetensorsEntry& entry(const std::string& name) const {
    const SafetensorsEntry* e = file_.find(name);
    UPMOE_CHECK(e != nullptr, "{}: no tensor '{}'", file_.path().string(), name);
    return *e;
  }
  static void scatter(const std::vector<float>& part, const Box& box, const Shape& global,
                      std::vector<float>& whole) {
    std::size_t i = 0;
    for_each_index(box, global, [&](std::int64_t at) { whole[static_cast<std::size_t>(at)] = part[i++]; });
  }

  SafetensorsFile file_;
  ModelConfig config_;
  std::int64_t rows_ = 0, seq_len_ = 0;
  std::vector<std::uint32_t> stream_;
};

inline const std::vector<std::string>& golden_cases() {
  static const std::vector<std::string> names{
      "dense",   "dense_tied_gqa", "moe_a27b", "moe_renorm", "moe_mixed", "moe_odd", "llama", "qwen3",
      "mistral", "gemma",          "mixtral",  "qwen3_moe",  "deepseek",  "dots1",   "dbrx"};
  return names;
}

}  // namespace upmoe::test
