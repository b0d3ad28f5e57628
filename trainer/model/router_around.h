#pragma once
// A router around another one: it does what that one does, but for what it overrides.

#include <memory>
#include <utility>

#include "trainer/model/router.h"

namespace upmoe {

class RouterAround : public Router {
 public:
  explicit RouterAround(std::unique_ptr<const Router> inner) : inner_(std::move(inner)) {}

  Choices forward(Exec& ex, ConstTensorView x_TD, const RouterBalance& balance, Arena& keep,
                  Saved& saved) const override {
    return inner_->forward(ex, x_TD, balance, keep, saved);
  }
  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const RouterBalance& balance,
                const Saved& saved) const override {
    inner_->backward(ex, dx_TD, dweight_TK, balance, saved);
  }
  RowSums outputs(Exec& ex, const RowSums& of_tokens, Arena& keep, Saved& saved) const override {
    return inner_->outputs(ex, of_tokens, keep, saved);
  }
  void share_outputs(Exec& ex, TensorView y_TD, const RouterBalance& balance,
                     const Saved& saved) const override {
    inner_->share_outputs(ex, y_TD, balance, saved);
  }
  ConstTensorView output_gradient(Exec& ex, ConstTensorView dy_TD, const RouterBalance& balance,
                                  Saved& saved) const override {
    return inner_->output_gradient(ex, dy_TD, balance, saved);
  }
  RowSums row_gradient(Exec& ex, const RowSums& of_tokens, Saved& saved) const override {
    return inner_->row_gradient(ex, of_tokens, saved);
  }

 private:
  std::unique_ptr<const Router> inner_;
};

}  // namespace upmoe
