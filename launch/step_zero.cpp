#include "launch/step_zero.h"

#include <memory>

#include "launch/token_sets.h"
#include "launch/whole_model.h"
#include "parallel/self_comm.h"
#include "trainer/model_distance.h"

namespace upmoe {

void require_step_zero_tokens(const std::filesystem::path& source, const StepZeroRequest& request) {
  const TokenSetsRequest tokens{.files = {request.tokens}, .seq_len = request.seq_len, .warns = false};
  open_token_sets(*open_model(source), tokens);
}

StepZero measure_step_zero(const std::filesystem::path& source, const std::filesystem::path& made,
                           const StepZeroRequest& request) {
  const std::unique_ptr<ModelSource> dense = open_model(source), mixture = open_model(made);
  const TokenSets sets = open_token_sets(*dense, {.files = {request.tokens}, .seq_len = request.seq_len});
  const std::unique_ptr<Communicator> self = make_self_communicator();
  const std::unique_ptr<RankModel> origin = whole_model(*dense, *self, request.precision),
                                   model = whole_model(*mixture, *self, request.precision);
  const ModelDistance distance = distance_between(*model, *origin, *sets.front(), request.sequences);
  return {distance.loss, distance.origin_loss, distance.divergence, distance.tokens, request.seq_len};
}

}  // namespace upmoe
