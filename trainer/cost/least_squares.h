#pragma once
// Small least squares problems, and the minimum of a function of one or two numbers.

#include <functional>
#include <optional>
#include <vector>

namespace upmoe {

// c with sum_i w_i (y_i - sum_k c_k x_ik)^2 least. Only columns whose bit is set in `chosen` take part; the others' c
// is 0. `weights` empty: all 1. Nothing when the chosen columns do not determine it.
std::optional<std::vector<double>> least_squares(const std::vector<std::vector<double>>& x,
                                                 const std::vector<double>& y,
                                                 const std::vector<double>& weights, unsigned chosen);

// Where `f` is least between `lowest` and `highest`: the best of a grid, refined by the simplex of Nelder and Mead, in
// which `f` may be asked beyond them. The same for the same arguments, to the bit.
std::vector<double> minimum(const std::function<double(const std::vector<double>&)>& f,
                            const std::vector<double>& lowest, const std::vector<double>& highest);

}  // namespace upmoe
