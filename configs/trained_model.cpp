#include "configs/trained_model.h"

#include <utility>

#include "configs/lora_record.h"
#include "configs/router_record.h"

namespace upmoe {

ModelConfig trained_model(const RunConfig& run, ModelConfig source) {
  return with_lora(with_router(std::move(source), run.router), run.lora);
}

}  // namespace upmoe
