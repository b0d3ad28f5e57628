#include "trainer/cost/claim.h"

#include <cstdlib>

#include "trainer/cost/published.h"

namespace upmoe {

namespace {

constexpr double kDenseNonEmbeddingInText = 6.5;  // 10^9 parameters; the announcement's table has 6.4

std::string percent(double share) {
  return fmt::format("{:.1f} %", 100 * share);
}

double billions(std::int64_t n) {
  return static_cast<double>(n) * 1e-9;
}

// 1 - a / b, with both numbers written out.
ClaimReading ratio(const std::string& reading, const char* numbers, double a, double b, int decimals) {
  const double saving = 1 - a / b;
  return {.reading = reading,
          .formula = fmt::format("1 - {:.{}f} / {:.{}f} ({})", a, decimals, b, decimals, numbers),
          .saving = saving,
          .tokens = {},
          .result = percent(saving)};
}

class Readings {
 public:
  Readings(const ClaimedModels& at, const ClaimFacts& facts)
      : facts_(facts),
        seq_len_(at.mixture.seq_len),
        mixture_(at.mixture.train_flops),
        dense_(at.dense.train_flops),
        source_(at.source.train_flops) {}

  ClaimReading equal_tokens() const {
    ClaimReading r =
        ratio("FLOPs per token, equal tokens", "GFLOP per token", mixture_ * 1e-9, dense_ * 1e-9, 2);
    r.seq_len = seq_len_;
    return r;
  }

  // The mixture's tokens, of the 7B's, with which its cost is `cost` of the 7B's; the source's may be charged.
  ClaimReading tokens_for(double cost, const std::string& reading, bool with_source) const {
    const double charged = with_source ? source_ / dense_ : 0.0, left = cost - charged,
                 tokens = left * dense_ / mixture_;
    const std::string formula =
        with_source ? fmt::format("({:.2f} - {:.3f}) / {:.4f}", cost, charged, mixture_ / dense_)
                    : fmt::format("{:.2f} / {:.4f}", cost, mixture_ / dense_);
    const std::string result =
        tokens <= 0 ? fmt::format("impossible: the source alone costs {} of the 7B", percent(charged))
                    : fmt::format("{} saved if it saw {:.3f} of the 7B's tokens ({:.2f}T of {:.0f}T)",
                                  percent(1 - cost), tokens, tokens * facts_.corpus_tokens * 1e-12,
                                  facts_.corpus_tokens * 1e-12);
    return {.reading = reading,
            .formula = formula + " (tokens, of the 7B's)",
            .seq_len = seq_len_,
            .saving = tokens > 0 ? std::optional(1 - cost) : std::nullopt,
            .tokens = tokens,
            .result = result};
  }

  ClaimReading hours() const {
    const double tokens = facts_.claimed_cost * dense_ / mixture_ * facts_.corpus_tokens,
                 hours = device_hours(tokens * mixture_, facts_.peak_flops_per_s, facts_.mixture_mfu);
    return {
        .reading = "GPU-hours of those tokens",
        .formula = fmt::format("{:.2f}e12 tokens * {:.2f}e9 / ({:.1f}e12 * {:.3f} * 3600)", tokens * 1e-12,
                               mixture_ * 1e-9, facts_.peak_flops_per_s * 1e-12, facts_.mixture_mfu),
        .seq_len = seq_len_,
        .saving = {},
        .tokens = {},
        .result = fmt::format("{:.1f}k hours of one H200, at the MFU measured here", hours * 1e-3)};
  }

  ClaimReading hours_at_equal_tokens() const {
    const double saving = 1 - mixture_ / dense_ * facts_.dense_mfu / facts_.mixture_mfu;
    return {.reading = "GPU-hours, equal tokens",
            .formula = fmt::format(
                "1 - {:.4f} * {:.2f} / {:.3f} (FLOPs, MFU of the 7B given, of the mixture measured)",
                mixture_ / dense_, facts_.dense_mfu, facts_.mixture_mfu),
            .seq_len = seq_len_,
            .saving = saving,
            .tokens = {},
            .result = percent(saving)};
  }

 private:
  const ClaimFacts& facts_;
  std::int64_t seq_len_;
  double mixture_, dense_, source_;
};

}  // namespace

std::vector<ClaimReading> card_readings(const ParamCounts& mixture, const ParamCounts& source,
                                        const CardFacts& facts) {
  std::vector<ClaimReading> all;
  const auto read = [&](const char* counted, double n, double n_source, bool with_source) {
    const double flops = 6 * (n * facts.tokens + (with_source ? n_source * facts.source_tokens : 0));
    const std::string own = fmt::format("{:.4f}e9 * {:.1f}e12", n * 1e-9, facts.tokens * 1e-12);
    all.push_back(
        {.reading = fmt::format("{}, source {}", counted, with_source ? "charged (inferred)" : "not charged"),
         .formula = with_source ? fmt::format("6 * ({} + {:.4f}e9 * {:.0f}e12)", own, n_source * 1e-9,
                                              facts.source_tokens * 1e-12)
                                : fmt::format("6 * {}", own),
         .saving = {},
         .tokens = {},
         .result = fmt::format("{:.2e} FLOP, {:.0f} % of the {:.2e} printed", flops,
                               100 * flops / facts.printed_flops, facts.printed_flops)});
  };
  const auto count = [](std::int64_t n) { return static_cast<double>(n); };
  for (const bool with_source : {false, true}) {
    read("activated parameters", count(mixture.activated), count(source.activated), with_source);
    read("non-embedding parameters", count(mixture.activated_non_embedding),
         count(source.activated_non_embedding), with_source);
  }
  return all;
}

std::vector<ClaimReading> claim_readings(const std::vector<ClaimedModels>& by_length,
                                         const ClaimFacts& facts) {
  UPMOE_CHECK(!by_length.empty(), "no sequence length");
  const ParamCounts &mixture = by_length.front().mixture.parameters,
                    &dense = by_length.front().dense.parameters;
  std::vector<ClaimReading> all;
  const PublishedCells printed = published_model("qwen1.5-moe-a2.7b").cells,
                       printed_dense = published_model("qwen1.5-7b").cells;
  all.push_back(ratio("non-embedding parameters, as printed", "10^9, activated",
                      std::atof(printed.activated_non_embedding), kDenseNonEmbeddingInText, 1));
  all.push_back(ratio("non-embedding parameters, counted (6N)", "10^9, activated",
                      billions(mixture.activated_non_embedding), billions(dense.activated_non_embedding), 4));
  all.push_back(ratio("activated parameters, as printed", "10^9", std::atof(printed.activated),
                      std::atof(printed_dense.activated), 1));
  all.push_back(ratio("activated parameters, counted (6N)", "10^9", billions(mixture.activated),
                      billions(dense.activated), 4));
  const auto for_each_length = [&](auto reading) {
    for (const ClaimedModels& at : by_length) all.push_back(reading(Readings(at, facts)));
  };
  for_each_length([](const Readings& r) { return r.equal_tokens(); });
  for_each_length([&](const Readings& r) {
    return r.tokens_for(facts.claimed_cost, "fewer tokens, source not charged (sunk)", false);
  });
  for_each_length([&](const Readings& r) {
    return r.tokens_for(facts.claimed_cost, "fewer tokens, source charged at the 7B's tokens", true);
  });
  for_each_length([&](const Readings& r) {
    return r.tokens_for(facts.first_claimed_cost, "the model card's first revision, source not charged",
                        false);
  });
  for_each_length([](const Readings& r) { return r.hours(); });
  for_each_length([](const Readings& r) { return r.hours_at_equal_tokens(); });
  return all;
}

}  // namespace upmoe
