#include "launch/whole_model.h"

namespace upmoe {

std::unique_ptr<RankModel> whole_model(const ModelSource& source, Communicator& self, Precision precision) {
  auto model =
      std::make_unique<RankModel>(source.config(), MeshSpec{}, self, Device{},
                                  RankModel::Options{.dtype = dtype_of(precision), .gradients = false});
  model->params.load(model->memory.exec,
                     [&](const ParamSpec& p, const Box& box, TensorView out) { source.read(p, box, out); });
  return model;
}

}  // namespace upmoe
