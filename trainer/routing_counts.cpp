#include "trainer/routing_counts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <numeric>

namespace upmoe {

using nlohmann::json;

namespace {

using Table = std::vector<std::vector<std::int64_t>>;

Table table(std::size_t groups, std::int64_t experts) {
  return Table(groups, std::vector<std::int64_t>(static_cast<std::size_t>(experts), 0));
}

std::int64_t sum(const std::vector<std::int64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

std::vector<std::int64_t> column_sums(const Table& counts_GE) {
  std::vector<std::int64_t> all(counts_GE.empty() ? 0 : counts_GE.front().size(), 0);
  for (const auto& row : counts_GE)
    for (std::size_t e = 0; e < row.size(); ++e) all[e] += row[e];
  return all;
}

double squares(const std::vector<std::int64_t>& counts, double whole) {
  double total = 0;
  for (const std::int64_t c : counts) total += std::pow(static_cast<double>(c) / whole, 2);
  return total;
}

}  // namespace

// What a token chose, rising, and the weightiest of it; the lowest expert among equals.
struct RoutingCounts::Chosen {
  std::vector<std::int32_t> experts = {};
  std::int32_t first = -1;

  Chosen() = default;
  Chosen(const std::int32_t* index_K, const float* weight_K, std::int64_t K) {
    float most = 0;
    for (std::int64_t k = 0; k < K; ++k) {
      if (index_K[k] < 0) continue;
      experts.push_back(index_K[k]);
      if (first < 0 || weight_K[k] > most || (weight_K[k] == most && index_K[k] < first)) {
        most = weight_K[k];
        first = index_K[k];
      }
    }
    std::sort(experts.begin(), experts.end());
  }
  // Share of the choices of the one that has more which the other one has too.
  double overlap(const Chosen& other) const {
    std::vector<std::int32_t> both;
    std::set_intersection(experts.begin(), experts.end(), other.experts.begin(), other.experts.end(),
                          std::back_inserter(both));
    return static_cast<double>(both.size()) /
           static_cast<double>(std::max(experts.size(), other.experts.size()));
  }
};

TokenClasses frequency_bands(const std::vector<std::int64_t>& counts_V) {
  // What share of the text the tokens of a band and of those before it make up.
  constexpr double kUpTo[] = {0.5, 0.8, 0.95, 1.0};
  TokenClasses classes{{"commonest, 50 % of the text", "next 30 %", "next 15 %", "rarest, 5 %"},
                       std::vector<int>(counts_V.size(), 3),
                       "frequency in these files, because the model has no tokenizer.json beside it"};
  std::vector<std::size_t> order(counts_V.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return counts_V[a] > counts_V[b]; });
  const auto whole = static_cast<double>(sum(counts_V));
  std::int64_t before = 0;  // tokens of the text that commoner ones are
  for (const std::size_t token : order) {
    int band = 0;
    while (band < 3 && static_cast<double>(before) >= kUpTo[band] * whole) ++band;
    classes.of_token[token] = band;
    before += counts_V[token];
  }
  return classes;
}

Repeats repeats_of(const MixtureCounts& counts, std::size_t source) {
  Repeats r;
  const auto pairs = static_cast<double>(counts.pairs[source]);
  if (pairs == 0) return r;
  const auto &first = counts.first_by_source[source], &all = counts.by_source[source];
  const double choosing = static_cast<double>(sum(first)),
               of_token = static_cast<double>(sum(all)) / choosing;
  r.first = static_cast<double>(counts.same_first[source]) / pairs;
  r.first_by_chance = squares(first, choosing);
  r.overlap = counts.overlap[source] / pairs;
  r.overlap_by_chance = squares(all, choosing) / of_token;
  return r;
}

double information_bits(const Table& counts_GE) {
  const std::vector<std::int64_t> all = column_sums(counts_GE);
  const auto whole = static_cast<double>(sum(all));
  double bits = 0;
  for (const auto& row : counts_GE) {
    const auto of_group = static_cast<double>(sum(row));
    for (std::size_t e = 0; e < row.size(); ++e) {
      const auto both = static_cast<double>(row[e]);
      if (both > 0) bits += both / whole * std::log2(both * whole / (of_group * static_cast<double>(all[e])));
    }
  }
  return std::max(0.0, bits);
}

RoutingCounts::RoutingCounts(const ModelConfig& model, TokenClasses classes, std::int64_t seq_len)
    : experts_(model.num_experts),
      seq_len_(seq_len),
      parts_(std::min(kPositions, seq_len)),
      classes_(std::move(classes)) {
  if (model.num_moe_layers() == 0)
    fail(ExitCode::kUsage, "--routing: the model ({}) has no experts to choose from", model.model_type);
  if (model.router.kind == RouterKind::kMixtureOfTokens)
    fail(ExitCode::kUsage,
         "--routing: with router.kind mixture_of_tokens no "
         "token chooses: its experts compute mixtures of all");
  for (int block = 0; block < model.num_hidden_layers; ++block) {
    mixture_of_block_.push_back(model.is_moe_layer(block) ? static_cast<int>(mixtures_.size()) : -1);
    if (!model.is_moe_layer(block)) continue;
    MixtureCounts& counts = mixtures_.emplace_back();
    counts.block = block;
    counts.by_position = table(static_cast<std::size_t>(parts_), experts_);
    counts.by_class = table(classes_.names.size(), experts_);
  }
  tokens_by_class_.assign(classes_.names.size(), 0);
  tokens_by_position_.assign(static_cast<std::size_t>(parts_), 0);
}

std::pair<std::int64_t, std::int64_t> RoutingCounts::bounds_of(std::int64_t part) const {
  const auto begin = [&](std::int64_t i) { return (i * seq_len_ + parts_ - 1) / parts_; };
  return {begin(part), begin(part + 1)};
}

void RoutingCounts::count_tokens(ConstTensorView tokens_T) {
  const std::int64_t T = tokens_T.rows();
  sources_.back().tokens += T;
  sources_.back().sequences += T / seq_len_;
  for (std::int64_t t = 0; t < T; ++t) {
    const auto token = static_cast<std::size_t>(tokens_T.as<std::int32_t>()[t]);
    if (token >= classes_.of_token.size())
      classes_.of_token.resize(token + 1, static_cast<int>(classes_.names.size()) - 1);
    ++tokens_by_class_[static_cast<std::size_t>(classes_.of_token[token])];
    ++tokens_by_position_[static_cast<std::size_t>(t % seq_len_ * parts_ / seq_len_)];
  }
}

void RoutingCounts::count(ConstTensorView tokens_T, int block, const Choices& choices) {
  MixtureCounts& to = mixtures_[static_cast<std::size_t>(mixture_of_block_[static_cast<std::size_t>(block)])];
  const std::size_t source = sources_.size() - 1;
  const std::int64_t T = choices.index_TK.rows(), K = choices.index_TK.shape[1];
  const auto* index_TK = choices.index_TK.as<std::int32_t>();
  const auto* weight_TK = choices.weight_TK.as<float>();
  const auto* tokens = tokens_T.as<std::int32_t>();
  UPMOE_CHECK(T == tokens_T.rows(), "choices of other tokens");
  Chosen before;
  for (std::int64_t t = 0; t < T; ++t) {
    const Chosen now(index_TK + t * K, weight_TK + t * K, K);
    const auto part = static_cast<std::size_t>(t % seq_len_ * parts_ / seq_len_);
    const auto kind = static_cast<std::size_t>(classes_.of_token[static_cast<std::size_t>(tokens[t])]);
    for (const std::int32_t expert : now.experts) {
      const auto e = static_cast<std::size_t>(expert);
      ++to.by_source[source][e];
      ++to.by_position[part][e];
      ++to.by_class[kind][e];
    }
    if (now.first >= 0) ++to.first_by_source[source][static_cast<std::size_t>(now.first)];
    if (t % seq_len_ > 0 && now.first >= 0 && before.first >= 0) {
      ++to.pairs[source];
      to.same_first[source] += now.first == before.first ? 1 : 0;
      to.overlap[source] += now.overlap(before);
    }
    before = now;
  }
}

void RoutingCounts::add_source(const std::string& name, RankModel& model, const TokenDataset& data,
                               const EvalOptions& options) {
  UPMOE_CHECK(model.memory.exec.device.type == DeviceType::kCpu && data.seq_len() == seq_len_,
              "choices on the CPU, of sequences of one length");
  sources_.push_back({name});
  for (MixtureCounts& m : mixtures_) {
    for (Table* of_sources : {&m.by_source, &m.first_by_source})
      of_sources->emplace_back(static_cast<std::size_t>(experts_), 0);
    for (auto* of_sources : {&m.pairs, &m.same_first}) of_sources->push_back(0);
    m.overlap.push_back(0);
  }
  const SeeRouting see = [&](ConstTensorView tokens_T, int block, const Choices& choices) {
    if (block == mixtures_.front().block) count_tokens(tokens_T);  // once for all of them
    count(tokens_T, block, choices);
  };
  sources_.back().loss = evaluate(model, data, options, {}, see).loss;
}

std::string RoutingCounts::as_json(const std::string& model_name) const {
  auto positions = json::array(), classes = json::array(), sources = json::array(), layers = json::array();
  for (std::int64_t part = 0; part < parts_; ++part) {
    const auto [first, last] = bounds_of(part);
    positions.push_back({{"first", first},
                         {"last", last - 1},
                         {"tokens", tokens_by_position_[static_cast<std::size_t>(part)]}});
  }
  for (std::size_t c = 0; c < classes_.names.size(); ++c)
    classes.push_back({{"name", classes_.names[c]}, {"tokens", tokens_by_class_[c]}});
  for (const Source& s : sources_)
    sources.push_back({{"name", s.name}, {"sequences", s.sequences}, {"tokens", s.tokens}, {"loss", s.loss}});
  for (const MixtureCounts& m : mixtures_) {
    auto repeats = json::array();
    for (std::size_t s = 0; s < sources_.size(); ++s) {
      const Repeats r = repeats_of(m, s);
      repeats.push_back({{"pairs", m.pairs[s]},
                         {"first", r.first},
                         {"first_by_chance", r.first_by_chance},
                         {"overlap", r.overlap},
                         {"overlap_by_chance", r.overlap_by_chance}});
    }
    layers.push_back({{"layer", m.block},
                      {"assignments", column_sums(m.by_source)},
                      {"by_source", m.by_source},
                      {"first_by_source", m.first_by_source},
                      {"by_position", m.by_position},
                      {"by_class", m.by_class},
                      {"bits",
                       {{"source", information_bits(m.by_source)},
                        {"position", information_bits(m.by_position)},
                        {"class", information_bits(m.by_class)}}},
                      {"repeats", repeats}});
  }
  const json whole{{"kind", "routing"},   {"model", model_name},       {"seq_len", seq_len_},
                   {"experts", experts_}, {"sources", sources},        {"positions", positions},
                   {"classes", classes},  {"classes_by", classes_.by}, {"layers", layers}};
  return whole.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
}

std::string RoutingCounts::summary() const {
  std::string text = fmt::format("classes by {}\n", classes_.by);
  for (const Source& s : sources_)
    text += fmt::format("{}: {} tokens in {} sequences of {}, loss {:.4f}\n", s.name, s.tokens, s.sequences,
                        seq_len_, s.loss);
  text += fmt::format("{:>5}  {:>6} {:>6} {:>5}  {:>8} {:>8} {:>8}  {:>14}  {:>14}\n", "layer", "most",
                      "least", "idle", "source", "position", "class", "same first", "same choices");
  for (const MixtureCounts& m : mixtures_) {
    const std::vector<std::int64_t> all = column_sums(m.by_source);
    const double fair = static_cast<double>(sum(all)) / static_cast<double>(experts_);
    const auto [least, most] = std::minmax_element(all.begin(), all.end());
    double first = 0, first_chance = 0, overlap = 0, overlap_chance = 0;
    const auto whole = static_cast<double>(sum(m.pairs));
    for (std::size_t s = 0; s < sources_.size() && whole > 0; ++s) {
      const Repeats r = repeats_of(m, s);
      const double share = static_cast<double>(m.pairs[s]) / whole;
      first += share * r.first;
      first_chance += share * r.first_by_chance;
      overlap += share * r.overlap;
      overlap_chance += share * r.overlap_by_chance;
    }
    text += fmt::format(
        "{:>5}  {:6.2f} {:6.2f} {:>5}  {:8.4f} {:8.4f} {:8.4f}  {:6.3f} ({:.3f})  {:6.3f} ({:.3f})\n",
        m.block, static_cast<double>(*most) / fair, static_cast<double>(*least) / fair,
        std::count(all.begin(), all.end(), 0), information_bits(m.by_source), information_bits(m.by_position),
        information_bits(m.by_class), first, first_chance, overlap, overlap_chance);
  }
  return text +
         "most, least: fair shares of the busiest and the least used expert. source, position, class: bits "
         "that they say\nof a choice. same: share of neighbouring tokens with one first choice, and of their "
         "choices; in brackets what\nthe loads alone would give.\n";
}

}  // namespace upmoe
