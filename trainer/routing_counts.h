#pragma once
// Which experts fire for what: counts of a model's choices over token files, and the same as a JSON object.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "trainer/evaluation.h"

namespace upmoe {

// Each token of a vocabulary is of one class.
struct TokenClasses {
  std::vector<std::string> names;
  std::vector<int> of_token;  // by token; what stands behind its end is of the last class
  std::string by;             // in words: what says so
};
// Where no tokenizer tells: by how often a token stands in the texts, the commonest first. Ties: the lowest token.
TokenClasses frequency_bands(const std::vector<std::int64_t>& counts_V);

// Of one mixture with E experts; each table has a row for each group of tokens.
struct MixtureCounts {
  int block = 0;
  std::vector<std::vector<std::int64_t>> by_source, by_position, by_class;  // assignments, [groups][E]
  // Tokens whose weightiest choice it is, [sources][E].
  std::vector<std::vector<std::int64_t>> first_by_source;
  // Of tokens that stand beside each other in a sequence, by source: how many pairs there are of those that have a
  // choice, how many with the same first one, and the sum of the shares of their choices that are the same.
  std::vector<std::int64_t> pairs, same_first;
  std::vector<double> overlap;
};

// Of neighbours in one source: how alike their choices are, and how alike they would be if each token chose by the
// source's loads alone, whatever stands beside it.
struct Repeats {
  double first = 0, first_by_chance = 0;  // share of pairs with one first choice; sum of squared first loads
  double overlap = 0,
         overlap_by_chance = 0;  // of a token's choices; sum of squared chances over the choices of a token
};
Repeats repeats_of(const MixtureCounts& counts, std::size_t source);
// Mutual information of group and expert of an assignment, in bits: 0 where the group says nothing of the expert.
double information_bits(const std::vector<std::vector<std::int64_t>>& counts_GE);

class RoutingCounts {
 public:
  static constexpr std::int64_t kPositions = 8;  // parts of a sequence, at most

  // Throws Error(kUsage) for a model whose tokens choose no experts.
  RoutingCounts(const ModelConfig& model, TokenClasses classes, std::int64_t seq_len);
  // Evaluates the model on the first sequences of one more source, one rank, and counts.
  void add_source(const std::string& name, RankModel& model, const TokenDataset& data,
                  const EvalOptions& options);

  struct Source {
    std::string name;
    std::int64_t sequences = 0, tokens = 0;
    double loss = 0;
  };
  const std::vector<Source>& sources() const { return sources_; }
  const std::vector<MixtureCounts>& mixtures() const { return mixtures_; }
  const TokenClasses& classes() const { return classes_; }
  std::string as_json(const std::string& model_name) const;  // one object, with a newline
  std::string summary() const;                               // for people: a line for each mixture

 private:
  struct Chosen;                                // of one token
  void count_tokens(ConstTensorView tokens_T);  // whole sequences, here and below
  void count(ConstTensorView tokens_T, int block, const Choices& choices);
  std::pair<std::int64_t, std::int64_t> bounds_of(std::int64_t part) const;  // positions [first, second)

  std::int64_t experts_ = 0, seq_len_ = 0, parts_ = 0;
  TokenClasses classes_;
  std::vector<Source> sources_;
  std::vector<MixtureCounts> mixtures_;
  std::vector<int> mixture_of_block_;  // or -1
  std::vector<std::int64_t> tokens_by_class_, tokens_by_position_;
};

}  // namespace upmoe
