#pragma once
// What the config.json of every decoder says alike, in pieces: a family reads and writes those that it has.

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "configs/json_reader.h"
#include "configs/json_writer.h"
#include "configs/model_config.h"

namespace upmoe {

// Far beyond every model that exists, and small enough that products of three cannot overflow 64 bits.
inline constexpr std::int64_t kMaxWidth = 1 << 20, kMaxLayers = 10'000, kMaxExperts = 1 << 16,
                              kMaxHeads = 1 << 16, kMaxVocab = 1 << 26, kMaxWindow = 1 << 30,
                              kMaxPositions = std::numeric_limits<std::int32_t>::max();

// Reads into `target` when the key is there and right; problems are in the list otherwise.
class ConfigKeys {
 public:
  explicit ConfigKeys(JsonObject& json) : json_(json) {}
  template <class T>
  void integer(const std::string& key, T& target, std::int64_t least, std::int64_t most,
               bool required = true) {
    if (const auto v = json_.integer(key, least, most, required)) target = static_cast<T>(*v);
  }
  void number(const std::string& key, double& target, bool required, bool may_be_zero);
  void truth(const std::string& key, bool& target, bool required) {
    if (const auto v = json_.truth(key, required)) target = *v;
  }

 private:
  JsonObject& json_;
};

void read_sizes(JsonObject& json, ModelConfig& c);  // with the norms' epsilon, and whether the head is tied
// Of a family whose first files leave keys out, with one meaning to every reader.
struct LeftOut {
  std::optional<double> rope_theta = {};
  bool kv_heads = false;  // as many as there are heads
};
void read_heads(JsonObject& json, ModelConfig& c, const LeftOut& left_out = {});
void read_rope(JsonObject& json, ModelConfig& c, const LeftOut& left_out = {});
void read_dtype(JsonObject& json, ModelConfig& c);
void read_decoder(JsonObject& json, ModelConfig& c, const LeftOut& left_out = {});  // all of these
void require_silu(JsonObject& json);
// Of families whose files have it in any case: `otherwise` is what transformers takes without it.
void require_head_dim(JsonObject& json, const char* otherwise);
void require_no_bias(JsonObject& json, const char* key);  // which would give a matrix one
void require_full_attention(JsonObject& json);            // layer_types

void write_decoder(const ModelConfig& c, JsonWriter& json);  // all of the following
void write_sizes(const ModelConfig& c, JsonWriter& json);
void write_heads(const ModelConfig& c, JsonWriter& json);
void write_attention(const ModelConfig& c, JsonWriter& json);  // dropout, kinds of layers
void write_rope(const ModelConfig& c, JsonWriter& json);
void write_dtype(const ModelConfig& c, JsonWriter& json);

// Of families whose files have the key in any case: sliding_window, null where there is none.
void write_window(const ModelConfig& c, JsonWriter& json);

}  // namespace upmoe
