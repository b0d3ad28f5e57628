#pragma once
// Finite differences for a whole layer. The scalar is sum(y * probe) with a fixed random probe, summed in double; a
// gradient is tested along random directions of one tensor at a time: central difference against <grad, direction>.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "trainer/model/layer.h"

namespace upmoe::test {

// Host tensors of a test, with their memory.
class Host {
 public:
  explicit Host(unsigned seed) : random_(seed) {}
  TensorView normal(Shape shape, double std) {
    TensorView v = zeros(shape);
    std::normal_distribution<double> d(0.0, std);
    for (std::int64_t i = 0; i < v.elements(); ++i) v.as<float>()[i] = static_cast<float>(d(random_));
    return v;
  }
  TensorView zeros(Shape shape) {
    memory_.push_back(Buffer::allocate({}, static_cast<std::size_t>(shape.elements()) * sizeof(float) + 64));
    return memory_.back().view(shape, DType::kF32);
  }
  TensorView constant(Shape shape, float value) {
    TensorView v = zeros(shape);
    std::fill_n(v.as<float>(), v.elements(), value);
    return v;
  }
  Param param(Shape shape, double std) { return {normal(shape, std), zeros(shape)}; }
  std::mt19937& random() { return random_; }

 private:
  std::mt19937 random_;
  std::vector<Buffer> memory_;
};

inline double dot(ConstTensorView a, ConstTensorView b) {
  double sum = 0;
  for (std::int64_t i = 0; i < a.elements(); ++i) sum += double(a.as<float>()[i]) * double(b.as<float>()[i]);
  return sum;
}

// `scalar` evaluates the layer with the present contents of `value`; `grad` is the analytic gradient.
// `check_frozen` (optional) runs after each evaluation and fails the test when a discrete choice changed.
inline void expect_gradient(Host& host, const std::string& what, TensorView value, ConstTensorView grad,
                            const std::function<double()>& scalar, double step, double tolerance) {
  const std::vector<float> original(value.as<float>(), value.as<float>() + value.elements());
  for (int probe = 0; probe < 4; ++probe) {
    const TensorView direction = host.normal(value.shape, 1.0);
    const double expected = dot(grad, direction);
    const double scale = std::sqrt(dot(grad, grad) * dot(direction, direction) / double(value.elements()));
    double side[2];
    for (int s = 0; s < 2; ++s) {
      const double h = s == 0 ? step : -step;
      for (std::int64_t i = 0; i < value.elements(); ++i)
        value.as<float>()[i] =
            static_cast<float>(double(original[std::size_t(i)]) + h * double(direction.as<float>()[i]));
      side[s] = scalar();
    }
    std::copy(original.begin(), original.end(), value.as<float>());
    const double found = (side[0] - side[1]) / (2 * step);
    // `scale` is the size of a typical directional derivative: an error relative to it, so that a direction
    // that happens to be nearly orthogonal to the gradient does not blow up the ratio.
    EXPECT_NEAR(found, expected, tolerance * (scale + 1e-6)) << what << ", probe " << probe;
  }
}

}  // namespace upmoe::test
