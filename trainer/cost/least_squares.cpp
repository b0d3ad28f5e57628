#include "trainer/cost/least_squares.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/core/check.h"

namespace upmoe {

namespace {

constexpr double kSingular = 1e-12;  // of the largest pivot
constexpr int kGridPoints = 24;
constexpr int kRestarts = 4, kMoves = 400;

using Point = std::vector<double>;
using Function = std::function<double(const Point&)>;

// Gauss with the largest pivots; false when there is no single solution. a: [n, n + 1], the solution its last column.
bool solve(std::vector<Point>& a) {
  const std::size_t n = a.size();
  double largest = 0;
  for (std::size_t k = 0; k < n; ++k) {
    std::size_t pivot = k;
    for (std::size_t i = k + 1; i < n; ++i)
      if (std::abs(a[i][k]) > std::abs(a[pivot][k])) pivot = i;
    std::swap(a[k], a[pivot]);
    largest = std::max(largest, std::abs(a[k][k]));
    if (!(std::abs(a[k][k]) > kSingular * largest)) return false;
    for (std::size_t i = 0; i < n; ++i) {
      if (i == k) continue;
      const double factor = a[i][k] / a[k][k];
      for (std::size_t j = k; j <= n; ++j) a[i][j] -= factor * a[k][j];
    }
  }
  for (std::size_t k = 0; k < n; ++k) a[k][n] /= a[k][k];
  return true;
}

Point grid_minimum(const Function& f, const Point& lowest, const Point& highest) {
  Point best = lowest;
  double least = std::numeric_limits<double>::infinity();
  std::size_t points = 1;
  for (std::size_t d = 0; d < lowest.size(); ++d) points *= kGridPoints;
  for (std::size_t i = 0; i < points; ++i) {
    Point at = lowest;
    std::size_t rest = i;
    for (std::size_t d = 0; d < at.size(); ++d, rest /= kGridPoints)
      at[d] += (highest[d] - lowest[d]) * static_cast<double>(rest % kGridPoints) / (kGridPoints - 1);
    if (const double value = f(at); value < least) {
      least = value;
      best = at;
    }
  }
  return best;
}

class Simplex {
 public:
  Simplex(const Function& f, const Point& start, const Point& steps) : f_(f) {
    add(start);
    for (std::size_t d = 0; d < start.size(); ++d) {
      Point at = start;
      at[d] += steps[d];
      add(at);
    }
  }
  const Point& best() const { return corners_.front().second; }
  void move() {
    std::stable_sort(corners_.begin(), corners_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    auto& worst = corners_.back();
    const std::size_t others = corners_.size() - 1, dims = worst.second.size();
    Point middle(dims, 0);
    for (std::size_t i = 0; i < others; ++i)
      for (std::size_t d = 0; d < dims; ++d) middle[d] += corners_[i].second[d] / static_cast<double>(others);
    // The worst corner, taken through the middle of the others by so much.
    const auto through = [&](double by) {
      Point at = middle;
      for (std::size_t d = 0; d < dims; ++d) at[d] += by * (middle[d] - worst.second[d]);
      return std::pair(f_(at), at);
    };
    auto mirrored = through(1);
    if (mirrored.first < corners_.front().first) {
      auto further = through(2);
      worst = further.first < mirrored.first ? std::move(further) : std::move(mirrored);
    } else if (mirrored.first < corners_[others - 1].first) {
      worst = std::move(mirrored);
    } else {
      auto nearer = through(mirrored.first < worst.first ? 0.5 : -0.5);
      if (nearer.first < std::min(mirrored.first, worst.first)) {
        worst = std::move(nearer);
      } else {
        shrink();
      }
    }
    std::stable_sort(corners_.begin(), corners_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
  }

 private:
  void add(const Point& at) { corners_.emplace_back(f_(at), at); }
  void shrink() {
    for (std::size_t i = 1; i < corners_.size(); ++i) {
      Point& at = corners_[i].second;
      for (std::size_t d = 0; d < at.size(); ++d) at[d] = (at[d] + corners_.front().second[d]) / 2;
      corners_[i].first = f_(at);
    }
  }

  const Function& f_;
  std::vector<std::pair<double, Point>> corners_;
};

}  // namespace

std::optional<std::vector<double>> least_squares(const std::vector<std::vector<double>>& x,
                                                 const std::vector<double>& y,
                                                 const std::vector<double>& weights, unsigned chosen) {
  UPMOE_CHECK(!x.empty() && x.size() == y.size(), "{} rows, {} values", x.size(), y.size());
  std::vector<std::size_t> columns;
  for (std::size_t k = 0; k < x.front().size(); ++k)
    if ((chosen >> k & 1u) != 0) columns.push_back(k);
  const std::size_t n = columns.size();
  if (n == 0 || n > x.size()) return std::nullopt;
  std::vector<Point> normal;
  for (std::size_t p = 0; p < n; ++p) normal.emplace_back(n + 1, 0.0);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double w = weights.empty() ? 1 : weights[i];
    for (std::size_t p = 0; p < n; ++p) {
      for (std::size_t q = 0; q < n; ++q) normal[p][q] += w * x[i][columns[p]] * x[i][columns[q]];
      normal[p][n] += w * x[i][columns[p]] * y[i];
    }
  }
  if (!solve(normal)) return std::nullopt;
  std::vector<double> c(x.front().size(), 0);
  for (std::size_t p = 0; p < n; ++p) c[columns[p]] = normal[p][n];
  return c;
}

std::vector<double> minimum(const std::function<double(const std::vector<double>&)>& f,
                            const std::vector<double>& lowest, const std::vector<double>& highest) {
  UPMOE_CHECK(!lowest.empty() && lowest.size() == highest.size(), "{} numbers", lowest.size());
  Point best = grid_minimum(f, lowest, highest);
  Point steps(best.size());
  for (int restart = 0; restart < kRestarts; ++restart) {
    for (std::size_t d = 0; d < best.size(); ++d)
      steps[d] = (highest[d] - lowest[d]) / kGridPoints / std::pow(10.0, restart);
    Simplex simplex(f, best, steps);
    for (int m = 0; m < kMoves; ++m) simplex.move();
    best = simplex.best();
  }
  return best;
}

}  // namespace upmoe
