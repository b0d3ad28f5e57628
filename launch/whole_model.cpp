#include "launch/whole_model.h"

namespace upmoe {

void load_weights(RankModel& model, const ModelSource& source) {
  model.params.load(model.memory.exec,
                    [&](const ParamSpec& p, const Box& box, TensorView out) { source.read(p, box, out); });
}

std::unique_ptr<RankModel> whole_model(const ModelSource& source, Communicator& self, Precision precision) {
  auto model =
      std::make_unique<RankModel>(source.config(), MeshSpec{}, self, Device{},
                                  RankModel::Options{.dtype = dtype_of(precision), .gradients = false});
  load_weights(*model, source);
  return model;
}

}  // namespace upmoe
