// Times the variants of the experts' fused kernels (kernels/core/expert_variant.h) at the sizes of Qwen1.5-MoE-A2.7B,
// and writes the table of those that beat the first one (kernels/core/expert_variants.h), with what a file has of other
// devices and shapes:
//
//   time_variants configs/cuda/expert_variants.yaml [--tokens 8192,16384,32768] [--kernels up,down,...] [--uncompared]
//
// Rows are balanced, as an untrained router gives them, and by Zipf's law: the time of both together counts.
// The first stays where another is not faster by more than --gain. A variant that computes other bits than the first is
// an error: the table has no line of that kernel then. --uncompared leaves that out, where fewer tokens have shown it:
// results of gigabytes come to the host for it.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <random>

#include "configs/expert_variants.h"
#include "configs/timed_tables.h"
#include "configs/yaml_reader.h"
#include "kernels/core/bf16.h"
#include "kernels/core/gpu.h"
#include "kernels/ops/experts.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/transfer.h"
#include "trainer/rank_model.h"

namespace upmoe {
namespace {

struct Options {
  std::filesystem::path file;
  std::vector<std::int64_t> tokens{8192, 16384, 32768};
  std::vector<std::string> kernels;  // all of them where it is empty
  double gain = 0.01;
  bool compares = true;
  bool small = false;  // tries the program where time is short
};

// The operands of all kernels for one number of tokens, and what they write.
class Experts {
 public:
  Experts(const Options& options, std::int64_t tokens)
      : E(options.small ? 3 : 60),
        D(options.small ? 512 : 2048),
        F(options.small ? 128 : 1408),
        T(tokens),
        R(tokens * kChoices),
        times_(options.small ? 1 : 9),
        compares_(options.compares),
        memory_(Device{DeviceType::kCuda, 0}),
        ex_(memory_.exec) {
    for (TensorView* t : {&x_TD_, &dy_TD_}) *t = values({T, D}, 1.0f);
    gate_up_eGD_ = values({E, 2 * F, D}, 0.04f);
    down_eDF_ = values({E, D, F}, 0.04f);
    gate_up_RG_ = values({R, 2 * F}, 1.0f);
    h_RF_ = values({R, F}, 1.0f);
    dgate_up_RG_ = values({R, 2 * F}, 1.0f);
    for (const Shape& shape : {Shape{R, 2 * F}, Shape{R, F}, Shape{R, D}, Shape{E, 2 * F, D}, Shape{E, D, F}})
      out_.push_back(view(shape, DType::kBF16));
    dweight_R_ = view({R}, DType::kF32);
    weight_R_ = view({R}, DType::kF32);
    std::vector<float> weights(static_cast<std::size_t>(R), 0.25f);
    ops::upload(ex_, weight_R_, host_view(static_cast<const float*>(weights.data()), {R}));
  }

  ExpertProductShape shape(ExpertKernel kernel) const { return {kernel, E, D, F, R}; }

  // Rows of each expert and the choice behind each row.
  void route(bool zipf) {
    std::vector<double> shares(static_cast<std::size_t>(E), 1.0);
    for (std::size_t e = 0; zipf && e < shares.size(); ++e) shares[e] = 1.0 / static_cast<double>(e + 1);
    std::mt19937_64 random(3);
    std::discrete_distribution<std::size_t> expert(shares.begin(), shares.end());
    std::vector<std::int32_t> offsets(shares.size() + 1), choices(static_cast<std::size_t>(R));
    for (std::int64_t r = 0; r < R; ++r) ++offsets[expert(random) + 1];
    for (std::size_t e = 0; e < shares.size(); ++e) offsets[e + 1] += offsets[e];
    for (std::size_t r = 0; r < choices.size(); ++r) choices[r] = static_cast<std::int32_t>(r);
    std::shuffle(choices.begin(), choices.end(), random);
    offset_e1_ = indices(offsets);
    index_R_ = indices(choices);
  }

  // Seconds by each variant, the best of some; none where one computes other bits than the first.
  std::vector<double> seconds(ExpertKernel kernel) {
    std::vector<double> all;
    std::vector<std::vector<std::byte>> first;
    for (const ExpertVariant& variant : variants_of(kernel)) {
      ExpertVariants one;
      one.tables[gpu::device_name(0)] = {{shape(kernel), variant}};
      ex_.expert_variants = &one;
      const std::vector<std::vector<std::byte>> found = compares_ ? bits(kernel) : first;
      if (first.empty()) first = found;
      if (found != first) {
        fmt::print("WRONG {}: {}: other bits than the first\n", words_of(shape(kernel)), words_of(variant));
        ex_.expert_variants = nullptr;
        return {};
      }
      double best = 0;
      for (int i = 0; i < times_; ++i) {
        gpu::Event begin(true), end(true);
        begin.record(*ex_.stream);
        launch(kernel);
        end.record(*ex_.stream);
        ex_.stream->synchronize();
        const double s = std::max(end.seconds_since(begin), 1e-9);
        if (i == 0 || s < best) best = s;
      }
      all.push_back(best);
      ex_.expert_variants = nullptr;
    }
    return all;
  }

 private:
  static constexpr std::int64_t kChoices = 4;

  TensorView view(Shape shape, DType dtype) {
    const auto elements = static_cast<std::size_t>(shape.elements());
    buffers_.push_back(Buffer::allocate(ex_.device, elements * size_of(dtype)));
    return buffers_.back().view(shape, dtype);
  }
  // Numbers between -scale and scale: zeros cost less power, and clocks rise.
  TensorView values(Shape shape, float scale) {
    const TensorView t = view(shape, DType::kBF16);
    const std::int64_t elements = shape.elements(), piece = 1 << 20;
    std::vector<bf16> some(static_cast<std::size_t>(std::min(elements, piece)));
    std::minstd_rand random(static_cast<unsigned>(buffers_.size()));
    std::uniform_real_distribution<float> value(-scale, scale);
    for (bf16& v : some) v = to_bf16(value(random));
    const TensorView flat = buffers_.back().view({elements}, DType::kBF16);
    for (std::int64_t begin = 0; begin < elements; begin += piece) {
      const std::int64_t end = std::min(elements, begin + piece);
      ops::upload(ex_, flat.rows(begin, end),
                  host_view(static_cast<const bf16*>(some.data()), {end - begin}));
    }
    return t;
  }
  TensorView indices(const std::vector<std::int32_t>& of) {
    const TensorView t = view({static_cast<std::int64_t>(of.size())}, DType::kI32);
    ops::upload(ex_, t, host_view(of.data(), t.shape));
    return t;
  }

  // What the kernel writes.
  std::vector<TensorView> results(ExpertKernel kernel) const {
    switch (kernel) {
      case ExpertKernel::kUp:
        return {out_[0], out_[1]};
      case ExpertKernel::kDHidden:
        return {out_[0], out_[1], dweight_R_};
      case ExpertKernel::kDown:
      case ExpertKernel::kDx:
        return {out_[2]};
      case ExpertKernel::kDwGateUp:
        return {out_[3]};
      case ExpertKernel::kDwDown:
        return {out_[4]};
    }
    return {};
  }
  void launch(ExpertKernel kernel) {
    const ExpertRows rows{offset_e1_};
    const ops::ExpertFfn ffn{gate_up_eGD_, down_eDF_, weight_R_, rows, true};
    const ops::PickedRows x{x_TD_, index_R_, kChoices}, dy{dy_TD_, index_R_, kChoices};
    const std::vector<TensorView> to = results(kernel);
    switch (kernel) {
      case ExpertKernel::kUp:
        return ops::experts_up(ex_, to[0], to[1], x, ffn);
      case ExpertKernel::kDown:
        return ops::experts_rows(ex_, to[0], h_RF_, down_eDF_, Transpose::kYes, rows);
      case ExpertKernel::kDx:
        return ops::experts_rows(ex_, to[0], dgate_up_RG_, gate_up_eGD_, Transpose::kNo, rows);
      case ExpertKernel::kDHidden:
        return ops::experts_dhidden(ex_, {to[0], to[1], to[2]}, dy, gate_up_RG_, ffn);
      case ExpertKernel::kDwGateUp:
        return ops::experts_wgrad(ex_, to[0], {dgate_up_RG_, {}}, x, rows, Accumulate::kOverwrite);
      case ExpertKernel::kDwDown:
        return ops::experts_wgrad(ex_, to[0], dy, {h_RF_, {}}, rows, Accumulate::kOverwrite);
    }
  }
  // Once, into memory that holds nothing of another variant.
  std::vector<std::vector<std::byte>> bits(ExpertKernel kernel) {
    std::vector<std::vector<std::byte>> all;
    for (const TensorView& t : results(kernel)) ops::fill(ex_, t, NAN);
    launch(kernel);
    for (const TensorView& t : results(kernel)) {
      all.emplace_back(t.bytes());
      TensorView host = t;
      host.data = all.back().data();
      host.device = Device{DeviceType::kCpu};
      ops::download(ex_, host, t);
    }
    return all;
  }

  std::int64_t E, D, F, T, R;
  int times_;
  bool compares_;
  RankMemory memory_;
  Exec& ex_;
  std::vector<Buffer> buffers_;
  TensorView x_TD_, dy_TD_, gate_up_eGD_, down_eDF_, gate_up_RG_, h_RF_, dgate_up_RG_, weight_R_, dweight_R_,
      offset_e1_, index_R_;
  std::vector<TensorView> out_;
};

// Of one kernel at one number of tokens: the variant that the table shall name, if any, and a line for each. False
// where one computes other bits.
bool time_kernel(Experts& experts, ExpertKernel kernel, std::int64_t tokens, double gain,
                 VariantOfShape& table) {
  const auto variants = variants_of(kernel);
  const ExpertProductShape shape = experts.shape(kernel);
  table.erase(shape);
  std::vector<double> sums(variants.size());
  for (const bool zipf : {false, true}) {
    experts.route(zipf);
    const std::vector<double> seconds = experts.seconds(kernel);
    if (seconds.empty()) return false;
    for (std::size_t i = 0; i < variants.size(); ++i) {
      sums[i] += seconds[i];
      fmt::print(
          R"({{"tokens": {}, "routing": "{}", "variant_of": "{}", "blocks": {}, "stages": {}, "order": "{}", "lag": {}, "ms": {:.4f}}})"
          "\n",
          tokens, zipf ? "zipf" : "balanced", name_of(kernel), variants[i].blocks, variants[i].stages,
          name_of(variants[i].order), variants[i].lag, 1e3 * seconds[i]);
    }
  }
  const auto best = static_cast<std::size_t>(std::min_element(sums.begin(), sums.end()) - sums.begin());
  fmt::print("{}: first {:.3f} ms, best of {} {:.3f} ms: {}\n", words_of(shape), 1e3 * sums[0],
             variants.size(), 1e3 * sums[best], words_of(variants[best]));
  if (sums[best] * (1 + gain) < sums[0]) table.emplace(shape, variants[best]);
  return true;
}

bool run(const Options& options) {
  gpu::use(0);
  ExpertVariants all;
  if (std::filesystem::exists(options.file))
    all = parse_expert_variants(read_text_file(options.file), options.file.string());
  const std::string device = gpu::device_name(0);
  fmt::print("{}\n", device);
  VariantOfShape& table = all.tables[device];
  bool right = true;
  for (const std::int64_t tokens : options.tokens) {
    Experts experts(options, tokens);
    for (int i = 0; i < kExpertKernels; ++i) {
      const auto kernel = static_cast<ExpertKernel>(i);
      const auto wanted = std::find(options.kernels.begin(), options.kernels.end(), name_of(kernel));
      if (options.kernels.empty() || wanted != options.kernels.end())
        right = time_kernel(experts, kernel, tokens, options.gain, table) && right;
    }
  }
  write_timed_tables(options.file, to_yaml(all));
  return right;
}

}  // namespace
}  // namespace upmoe

int main(int argc, char** argv) {
  upmoe::Options options;
  CLI::App app("Times the variants of the experts' fused kernels and writes the table of the best");
  app.add_option("file", options.file)->required();
  app.add_option("--tokens", options.tokens)->delimiter(',');
  std::vector<std::string> kernels;
  for (int i = 0; i < upmoe::kExpertKernels; ++i)
    kernels.emplace_back(upmoe::name_of(static_cast<upmoe::ExpertKernel>(i)));
  app.add_option("--kernels", options.kernels)->delimiter(',')->check(CLI::IsMember(kernels));
  app.add_option("--gain", options.gain);
  app.add_flag("!--uncompared", options.compares);
  app.add_flag("--small", options.small);
  CLI11_PARSE(app, argc, argv);
  if (options.small) options.tokens = {40};
  try {
    return upmoe::run(options) ? 0 : 1;
  } catch (const upmoe::Error& e) {
    std::fprintf(stderr, "time_variants: error: %s\n", e.what());
    return static_cast<int>(e.code());
  }
}
