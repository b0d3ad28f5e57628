// A router around another one hands on whatever it does not override, also of routers whose rows are their own.

#include "trainer/model/router_around.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace upmoe {
namespace {

struct Call {
  std::string name;
  const void* given;  // the tensor that the call is about
  friend bool operator==(const Call&, const Call&) = default;
};

// Answers with tensors of its own, of which each call has one.
class Inner final : public Router {
 public:
  Inner(std::vector<Call>& calls, float (&answers)[4]) : calls_(calls), answers_(answers) {}
  Choices forward(Exec&, ConstTensorView x_TD, const RouterBalance&, Arena&, Saved&) const override {
    calls_.push_back({"forward", x_TD.data});
    return {answer(0), answer(0), true};
  }
  void backward(Exec&, TensorView dx_TD, ConstTensorView, const RouterBalance&, const Saved&) const override {
    calls_.push_back({"backward", dx_TD.data});
  }
  RowSums outputs(Exec&, const RowSums& of_tokens, Arena&, Saved&) const override {
    calls_.push_back({"outputs", of_tokens.out.data});
    return {answer(1)};
  }
  void share_outputs(Exec&, TensorView y_TD, const RouterBalance&, const Saved&) const override {
    calls_.push_back({"share_outputs", y_TD.data});
  }
  ConstTensorView output_gradient(Exec&, ConstTensorView dy_TD, const RouterBalance&, Saved&) const override {
    calls_.push_back({"output_gradient", dy_TD.data});
    return answer(2);
  }
  RowSums row_gradient(Exec&, const RowSums& of_tokens, Saved&) const override {
    calls_.push_back({"row_gradient", of_tokens.out.data});
    return {answer(3)};
  }

 private:
  TensorView answer(int call) const { return host_view(&answers_[call], {1, 1}); }
  std::vector<Call>& calls_;
  float (&answers_)[4];
};

struct Plain final : RouterAround {
  using RouterAround::RouterAround;
};

TEST(RouterAround, HandsEverythingOn) {
  std::vector<Call> calls;
  float answers[4] = {}, given[6] = {};
  const Plain plain(std::make_unique<Inner>(calls, answers));
  const Router& router = plain;
  Exec ex;
  Arena keep(Device{}, 4096, "kept");
  Router::Saved saved;
  const RouterBalance balance;
  std::vector<Call> expected;
  const auto next = [&](const char* name) {
    float* value = &given[expected.size()];
    expected.push_back({name, value});
    return host_view(value, {1, 1});
  };
  EXPECT_EQ(router.forward(ex, next("forward"), balance, keep, saved).weight_TK.as<float>(), &answers[0]);
  router.backward(ex, next("backward"), {}, balance, saved);
  EXPECT_EQ(router.outputs(ex, {next("outputs")}, keep, saved).out.as<float>(), &answers[1]);
  router.share_outputs(ex, next("share_outputs"), balance, saved);
  EXPECT_EQ(router.output_gradient(ex, next("output_gradient"), balance, saved).as<float>(), &answers[2]);
  EXPECT_EQ(router.row_gradient(ex, {next("row_gradient")}, saved).out.as<float>(), &answers[3]);
  EXPECT_EQ(calls, expected);
}

}  // namespace
}  // namespace upmoe
