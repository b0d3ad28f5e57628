// Adapters in PEFT's form and merged: names and shapes, every element where it belongs, and adapters of other models.

#include "data/peft_adapter.h"

#include <gmock/gmock.h>

#include <cmath>

#include "configs/adapter_params.h"
#include "configs/lora_record.h"
#include "data/box_runs.h"
#include "data/merged_weights.h"
#include "tests/data/models.h"

namespace upmoe::test {
namespace {

using ::testing::HasSubstr;
using enum LoraTarget;

const LoraForm kAll{2, 3, {kQuery, kKey, kValue, kOutput, kGate, kUp, kDown}};

// Every element by its parameter and place.
void read_drawn(const ParamSpec& p, const Box& box, TensorView out) {
  std::vector<float> values(static_cast<std::size_t>(p.shape.elements()));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = pseudo_random(p.name, static_cast<std::int64_t>(i));
  for_runs(whole(p.shape), box, box, [&](std::int64_t from, std::int64_t to, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      const float v = values[static_cast<std::size_t>(from + i)];
      if (out.dtype == DType::kF32) {
        out.as<float>()[to + i] = v;
      } else {
        out.as<bf16>()[to + i] = to_bf16(v);
      }
    }
  });
}

class Adapters : public Models {
 protected:
  ModelConfig base() { return put_config(true, false); }
  fs::path write(const ModelConfig& config, const std::string& name, DType dtype = DType::kF32) {
    const fs::path to = root / name;
    write_peft_adapter({.dir = to, .inputs = {dir}, .dtype = dtype, .base = "models/m", .base_digest = "d1"},
                       config, read_drawn);
    return to;
  }
  static std::string refusal(const fs::path& adapter, const ModelConfig& model) {
    try {
      PeftAdapter(adapter, model);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      return e.what();
    }
    return "taken";
  }
};

TEST_F(Adapters, HaveTheNamesAndShapesOfPefts) {
  const fs::path to = write(with_lora(base(), kAll), "adapter");
  const SafetensorsFile file(to / "adapter_model.safetensors");
  const std::string layer = "base_model.model.model.layers.1.";
  const auto shape = [&](const std::string& name) {
    const SafetensorsEntry* e = file.find(layer + name + ".weight");
    return e == nullptr ? std::vector<std::int64_t>{} : e->shape;
  };
  using Dims = std::vector<std::int64_t>;
  EXPECT_EQ(shape("self_attn.q_proj.lora_A"), (Dims{2, 8}));
  EXPECT_EQ(shape("self_attn.q_proj.lora_B"), (Dims{8, 2}));
  EXPECT_EQ(shape("self_attn.k_proj.lora_B"), (Dims{4, 2}));
  EXPECT_EQ(shape("self_attn.o_proj.lora_A"), (Dims{2, 8}));
  EXPECT_EQ(shape("mlp.experts.2.gate_proj.lora_B"), (Dims{6, 2}));
  EXPECT_EQ(shape("mlp.experts.0.down_proj.lora_A"), (Dims{2, 6}));
  EXPECT_EQ(shape("mlp.shared_expert.up_proj.lora_A"), (Dims{2, 8}));
  EXPECT_EQ(shape("mlp.shared_expert.down_proj.lora_B"), (Dims{8, 2}));
  // Two layers of four modules of attention, three of each of three experts and of the shared one.
  EXPECT_EQ(file.header().entries.size(), 2u * 2 * (4 + 3 * 3 + 3));
  EXPECT_EQ(file.header().metadata.at("upmoe_base"), "d1");
  const json config = json::parse(std::ifstream(to / "adapter_config.json"));
  EXPECT_EQ(config["peft_type"], "LORA");
  EXPECT_EQ(config["r"], 2);
  EXPECT_EQ(config["lora_alpha"], 3);
  EXPECT_EQ(config["base_model_name_or_path"], "models/m");
  EXPECT_EQ(config["target_modules"],
            (json{"down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"}));
}

TEST_F(Adapters, ReadBackAsTheyWere) {
  for (const LoraForm& form : {kAll, LoraForm{3, 1, {kValue, kUp}}})
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const ModelConfig config = with_lora(base(), form);
      const PeftAdapter adapter(write(config, fmt::format("{}{}", form.rank, name_of(dtype)), dtype), base());
      EXPECT_TRUE(same_lora(adapter.config().lora, form));
      EXPECT_EQ(adapter.base(), "models/m");
      EXPECT_EQ(adapter.base_digest(), "d1");
      for (const ParamSpec& p : make_param_table(config))
        for (std::uint64_t seed = 0; p.adapts && seed < 8; ++seed) {
          const Box box = seed == 0 ? whole(p.shape) : random_box(p.shape, seed, 1);
          std::vector<float> expected(static_cast<std::size_t>(box.elements())), found(expected.size());
          read_drawn(p, box, host_view(expected.data(), box.extent));
          if (dtype == DType::kBF16)
            for (float& v : expected) v = to_float(to_bf16(v));
          adapter.read(p, box, host_view(found.data(), box.extent));
          EXPECT_EQ(found, expected) << p.name;
        }
    }
}

// Half of fp32's last place, and a little for what is not of the first order.
constexpr double kRounding = 1.001 / (1 << 24);

// w + alpha / r b a of each module's tensors on disk, in double, by their names alone. In fp32 the product is rounded
// once and then the sum.
TEST_F(Adapters, MergeIntoTheWeightsOfTheirNames) {
  const ModelConfig plain = base(), config = with_lora(plain, kAll);
  const fs::path to = write(config, "adapter");
  const SafetensorsFile file(to / "adapter_model.safetensors");
  const auto values = [&](const std::string& name) {
    const SafetensorsEntry* e = file.find(name);
    std::vector<float> v(e == nullptr ? 0 : static_cast<std::size_t>(e->end - e->begin) / sizeof(float));
    if (e != nullptr) file.read(*e, 0, std::as_writable_bytes(std::span(v)));
    return v;
  };
  const PeftAdapter adapter(to, plain);
  const ReadTensor merged =
      with_adapters_merged(adapter.config(), [&](const ParamSpec& p, const Box& box, TensorView out) {
        p.adapts ? adapter.read(p, box, out) : read_drawn(p, box, out);
      });
  std::size_t changed = 0;
  for (const ParamSpec& p : make_param_table(plain))
    for (const HfTensor& t : hf_tensors_of(plain, p)) {
      std::vector<float> before(static_cast<std::size_t>(t.part.elements())), after(before.size());
      read_drawn(p, t.part, host_view(before.data(), t.part.extent));
      merged(p, t.part, host_view(after.data(), t.part.extent));
      const std::string module = "base_model.model." + t.name.substr(0, t.name.rfind('.'));
      const std::vector<float> a = values(module + ".lora_A.weight"), b = values(module + ".lora_B.weight");
      changed += a.empty() || t.name.ends_with("bias") ? 0 : 1;
      const std::size_t K = a.size() / 2;
      for (std::size_t i = 0; i < before.size(); ++i) {
        double added = 0;
        if (!a.empty() && t.name.ends_with(".weight"))
          for (std::size_t l = 0; l < 2; ++l)
            added += 1.5 * double(b[i / K * 2 + l]) * double(a[l * K + i % K]);
        const double expected = double(before[i]) + added;
        ASSERT_NEAR(after[i], expected, kRounding * (std::abs(added) + std::abs(expected)))
            << t.name << " " << i;
      }
    }
  EXPECT_EQ(changed, 2u * (4 + 3 * 3 + 3));
  // Any box is a part of the whole.
  for (const ParamSpec& p : make_param_table(plain)) {
    std::vector<float> all(static_cast<std::size_t>(p.shape.elements()));
    merged(p, whole(p.shape), host_view(all.data(), p.shape));
    for (std::uint64_t seed = 1; seed < 6; ++seed) {
      const Box box = random_box(p.shape, seed, 1);
      std::vector<float> part(static_cast<std::size_t>(box.elements()));
      std::vector<bf16> rounded(part.size());
      merged(p, box, host_view(part.data(), box.extent));
      merged(p, box, host_view(rounded.data(), box.extent));
      for_runs(whole(p.shape), box, box, [&](std::int64_t from, std::int64_t at, std::int64_t n) {
        for (std::int64_t i = 0; i < n; ++i) {
          ASSERT_EQ(part[static_cast<std::size_t>(at + i)], all[static_cast<std::size_t>(from + i)])
              << p.name;
          ASSERT_EQ(rounded[static_cast<std::size_t>(at + i)],
                    to_bf16(part[static_cast<std::size_t>(at + i)]));
        }
      });
    }
  }
}

TEST_F(Adapters, OfAnotherModelAreRefusedInWords) {
  const ModelConfig plain = base();
  const fs::path good = write(with_lora(plain, kAll), "good");
  EXPECT_EQ(refusal(good, plain), "taken");
  ModelConfig wider = plain;
  wider.hidden_size = 16;
  EXPECT_THAT(refusal(good, wider), HasSubstr("q_proj.lora_A.weight: shape [2, 8], expected [2, 16]"));
  ModelConfig deeper = plain;
  deeper.num_hidden_layers = 3;
  EXPECT_THAT(refusal(good, deeper), HasSubstr("layers.2.self_attn.q_proj.lora_A.weight: missing"));
  ModelConfig fewer = plain;
  fewer.num_experts = 2;
  EXPECT_THAT(refusal(good, fewer),
              HasSubstr("mlp.experts.2.gate_proj.lora_A.weight: not an adapter of this model"));
  EXPECT_THAT(refusal(root / "nowhere", plain), HasSubstr("holds no adapter_config.json"));
  const json config = json::parse(std::ifstream(good / "adapter_config.json"));
  const auto with = [&](const std::string& key, const json& value) {
    json other = config;
    other[key] = value;
    std::ofstream(good / "adapter_config.json") << other.dump();
    return refusal(good, plain);
  };
  EXPECT_THAT(with("target_modules", {"q_proj", "c_attn"}),
              HasSubstr("\"c_attn\" is no module of this qwen2_moe"));
  EXPECT_THAT(with("target_modules", "all-linear"), HasSubstr("expected a list of names"));
  EXPECT_THAT(with("target_modules", {"q_proj"}), HasSubstr("k_proj.lora_A.weight: not an adapter"));
  EXPECT_THAT(with("peft_type", "IA3"), HasSubstr("only LORA"));
  EXPECT_THAT(with("r", 4), HasSubstr("expected [4, 8]"));
  EXPECT_THAT(with("lora_alpha", -1), HasSubstr("lora_alpha"));
  for (const auto& [key, value] : std::map<std::string, json>{{"use_dora", true},
                                                              {"use_rslora", true},
                                                              {"bias", "all"},
                                                              {"modules_to_save", {"lm_head"}},
                                                              {"alora_invocation_tokens", {77, 78}},
                                                              {"use_qalora", true},
                                                              {"rank_pattern", {{"q_proj", 4}}}})
    EXPECT_THAT(with(key, value), HasSubstr(key + ": found")) << key;
  EXPECT_THAT(with("init_lora_weights", "pissa_niter_4"), HasSubstr("weights were changed"));
  EXPECT_THAT(with("init_lora_weights", "lora_ga"), HasSubstr("weights were changed"));
  EXPECT_EQ(with("lora_dropout", 0.1), "taken");  // of training alone
  testing::internal::CaptureStderr();
  EXPECT_EQ(with("a_key_of_tomorrow", 3), "taken");
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("a_key_of_tomorrow: 3 is not known here"));
  std::ofstream(good / "adapter_config.json") << "{\"r\": 2";
  EXPECT_NE(refusal(good, plain), "taken");
}

// A model directory has no adapters, whatever its config.json says.
TEST_F(Adapters, OfAModelDirectoryAreRefused) {
  std::ofstream(dir / "config.json") << to_hf_json(with_lora(base(), kAll));
  expect_refused({"upmoe_lora"}, "adapters of a directory");
}

}  // namespace
}  // namespace upmoe::test
