#include "upcycle/transforms.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "kernels/core/normal_batch.h"
#include "kernels/core/philox.h"

// This folder is compiled without contraction into fused multiply-adds, so that the bytes do not
// depend on the processor.

namespace upmoe {
namespace {

struct Rows {
  std::int64_t begin, end;
};

// Values of one distribution: number -> mean + std * number, scaled.
struct Drawn {
  std::uint64_t key;
  float mean, std, scale;
};

// Everything random here is numbered by where it stands in the tensor, never by when it was drawn:
//
//   row r of a tensor of C columns    numbers r C, r C + 1, ...
//
// so a row has the same values whichever rank and thread makes it, and in whatever pieces.
// The numbers first, first + 1, ... as elements; `numbers` is scratch of the same count.
template <class T>
void draw(const Drawn& d, std::int64_t first, std::span<float> numbers, T* out) {
  const auto count = static_cast<std::int64_t>(numbers.size());
  normal_batch(d.key, static_cast<std::uint64_t>(first), count, numbers.data());
  const float* z = numbers.data();
  for (std::int64_t i = 0; i < count; ++i) out[i] = from_float<T>(d.scale * (d.mean + d.std * z[i]));
}

// Of the source values that the redraw replaces, the deviation as of a sample (over n - 1); empty: it replaces none, as
// where it falls on padding. In the order of the source, whatever rows are asked for.
template <class T>
std::optional<Moments> replaced_moments(const ExpertMatrix& m, const FillContext& context) {
  const std::vector<std::int32_t> after = m.map.units_of(m.matrix, context.seed, context.permutations);
  std::vector<std::int32_t> units;
  for (std::size_t j = 0; j < after.size(); ++j) {
    const std::int32_t before = m.map.source_of(static_cast<std::int64_t>(j), context.permutations);
    if (after[j] == kNewUnit && before >= 0) units.push_back(before);
  }
  const std::shared_ptr<const SourceFfn> ffn = context.source_of(m.source).ffn(m.map.layer);
  const T* source = reinterpret_cast<const T*>(ffn->data(m.matrix));
  double sum = 0, square = 0;
  const auto add = [&](std::int64_t at) {
    const double v = to_float(source[at]);
    sum += v;
    square += v * v;
  };
  if (m.matrix == FfnMatrix::kDown) {
    for (std::int64_t d = 0; d < ffn->model_width; ++d)
      for (const std::int32_t u : units) add(d * ffn->width + u);
  } else {
    for (const std::int32_t u : units)
      for (std::int64_t d = 0; d < ffn->model_width; ++d) add(u * ffn->model_width + d);
  }
  const double n = static_cast<double>(units.size()) * static_cast<double>(ffn->model_width);
  if (n < 2) return std::nullopt;
  return Moments{sum / n, std::sqrt(std::max(0.0, (square - sum * sum / n) / (n - 1)))};
}

template <class T>
Drawn drawn_of(const RecipeLine& line, const ExpertMatrix& m, const FillContext& context) {
  Drawn d{philox_key(context.seed, line.target), 0.0f, static_cast<float>(m.redraw.std),
          static_cast<float>(m.scale)};
  if (m.redraw.from_source) {
    const std::optional<Moments> block =
        m.redraw.block ? replaced_moments<T>(m, context) : std::optional<Moments>{};
    const Moments& moments = block ? *block : context.survey_of(m.source).moments.at(m.from);
    d.mean = static_cast<float>(moments.mean);
    d.std = static_cast<float>(moments.std);
  }
  return d;
}

// What happens to kept values: untouched when neither noise nor scale is asked for.
struct Kept {
  std::uint64_t noise_key;
  float noise, scale;
  std::vector<bool> noisy;  // units; empty: all
  bool bitwise() const { return noise == 0.0f && scale == 1.0f; }
  bool reaches(std::int64_t unit) const { return noisy.empty() || noisy[static_cast<std::size_t>(unit)]; }
};

Kept kept_of(const RecipeLine& line, const ExpertMatrix& m, const FillContext& context) {
  Kept kept{philox_key(context.seed, line.target + ".noise"),
            static_cast<float>(m.noise),
            static_cast<float>(m.scale),
            {}};
  if (kept.noise != 0.0f) kept.noisy = m.map.noisy_units(m.matrix, context.seed);
  return kept;
}

// values[i] -> scale * (values[i] + noise * number first + i), without the noise where `reaches(i)` is false.
template <class T, class Reaches>
void change_kept(const Kept& kept, std::int64_t first, std::span<float> numbers, T* values,
                 const Reaches& reaches) {
  const auto count = static_cast<std::int64_t>(numbers.size());
  if (kept.noise == 0.0f) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = from_float<T>(kept.scale * to_float(values[i]));
    return;
  }
  normal_batch(kept.noise_key, static_cast<std::uint64_t>(first), count, numbers.data());
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = to_float(values[i]);
    // Not + 0: -0 stays.
    const float noisy = reaches(i) ? value + kept.noise * numbers[static_cast<std::size_t>(i)] : value;
    values[i] = from_float<T>(kept.scale * noisy);
  }
}

// Gate and up: a unit is a row.
template <class T>
void fill_unit_rows(const RecipeLine& line, const ExpertMatrix& m, Rows rows, const FillContext& context,
                    T* out) {
  const std::vector<std::int32_t> units = m.map.units_of(m.matrix, context.seed, context.permutations);
  const std::int64_t columns = line.columns();
  const std::shared_ptr<const SourceFfn> ffn = context.source_of(m.source).ffn(m.map.layer);
  const T* source = reinterpret_cast<const T*>(ffn->data(m.matrix));
  const Drawn drawn = drawn_of<T>(line, m, context);
  const Kept kept = kept_of(line, m, context);
  std::vector<float> numbers(static_cast<std::size_t>(columns));
  for (std::int64_t r = rows.begin; r < rows.end; ++r, out += columns) {
    // Rows without a source take their numbers at their own place, so a redraw does not move the numbers of other rows.
    const std::int32_t unit = units[static_cast<std::size_t>(r)];
    if (unit < 0) {  // padding's gate and up rows are as random as a new unit's
      draw(drawn, r * columns, numbers, out);
      continue;
    }
    std::memcpy(out, source + unit * columns, static_cast<std::size_t>(columns) * sizeof(T));
    if (!kept.bitwise())
      change_kept(kept, r * columns, numbers, out, [&](std::int64_t) { return kept.reaches(r); });
  }
}

// Down: a unit is a column. New columns take numbers in the order in which they stand in the row: number
// row * width + k for the k-th new column, so that a row's numbers are one consecutive run.
template <class T>
void fill_unit_columns(const RecipeLine& line, const ExpertMatrix& m, Rows rows, const FillContext& context,
                       T* out) {
  const std::vector<std::int32_t> units = m.map.units_of(m.matrix, context.seed, context.permutations);
  const std::int64_t width = line.columns();
  const std::shared_ptr<const SourceFfn> ffn = context.source_of(m.source).ffn(m.map.layer);
  const T* source = reinterpret_cast<const T*>(ffn->data(m.matrix));
  const Drawn drawn = drawn_of<T>(line, m, context);
  const Kept kept = kept_of(line, m, context);

  // Source column; where there is none, any, and overwritten below.
  std::vector<std::int32_t> gather(units.size());
  std::vector<std::int32_t> fresh, padding;  // columns of out
  for (std::size_t j = 0; j < units.size(); ++j) {
    gather[j] = std::max(units[j], 0);
    if (units[j] == kNewUnit) fresh.push_back(static_cast<std::int32_t>(j));
    if (units[j] == kPaddingUnit) padding.push_back(static_cast<std::int32_t>(j));
  }
  // What one row of `down` is made of, for units 4, new, 0, padding:
  //
  //   source row   | s0 s1 s2 s3 s4 |    gather  4 0 0 0    out  | s4  s0  s0  s0 |
  //                                      fresh   1               | s4  n0  s0  s0 |    n0: number r * width + 0
  //                                      padding       3         | s4  n0  s0  0  |
  const bool any_kept = fresh.size() + padding.size() < units.size();
  std::vector<float> numbers(units.size());
  std::vector<T> fresh_values(fresh.size()), row(static_cast<std::size_t>(ffn->width));
  for (std::int64_t r = rows.begin; r < rows.end; ++r, out += width) {
    if (any_kept) {
      // Through a copy: memory gives a row fast from front to back, slowly at random.
      std::memcpy(row.data(), source + r * ffn->width, row.size() * sizeof(T));
      for (std::int64_t j = 0; j < width; ++j) {
        out[j] = row[static_cast<std::size_t>(gather[static_cast<std::size_t>(j)])];
      }
      if (!kept.bitwise())
        change_kept(kept, r * width, std::span(numbers), out,
                    [&](std::int64_t j) { return kept.reaches(j); });
    }
    // Drawn together and scattered: normal_batch makes a run of numbers much faster than single ones.
    draw(drawn, r * width, std::span(numbers).first(fresh.size()), fresh_values.data());
    for (std::size_t k = 0; k < fresh.size(); ++k) out[fresh[k]] = fresh_values[k];
    for (const std::int32_t j : padding) out[j] = T{};
  }
}

template <class T>
void fill_matrix(const RecipeLine& line, const ExpertMatrix& m, Rows rows, const FillContext& context,
                 T* out) {
  if (m.matrix == FfnMatrix::kDown) {
    fill_unit_columns(line, m, rows, context, out);
  } else {
    fill_unit_rows(line, m, rows, context, out);
  }
}

template <class T>
void fill_matrix(const RecipeLine& line, const Copy& copy, Rows rows, const FillContext& context, T* out) {
  const std::int64_t columns = line.columns();
  const auto count = static_cast<std::size_t>((rows.end - rows.begin) * columns);
  const auto read = [&](int source, T* to) {
    context.source_of(source).read(copy.from, static_cast<std::uint64_t>(rows.begin * columns) * sizeof(T),
                                   {reinterpret_cast<std::byte*>(to), count * sizeof(T)});
  };
  if (copy.average_of == 1) return read(0, out);
  std::vector<double> sum(count, 0.0);
  std::vector<T> values(count);
  for (int i = 0; i < copy.average_of; ++i) {
    read(i, values.data());
    for (std::size_t k = 0; k < count; ++k) sum[k] += to_float(values[k]);
  }
  for (std::size_t k = 0; k < count; ++k)
    out[k] = from_float<T>(static_cast<float>(sum[k] / copy.average_of));
}

template <class T>
void fill_matrix(const RecipeLine& line, const RepeatedRows& repeated, Rows rows, const FillContext& context,
                 T* out) {
  const std::int64_t columns = line.columns();
  const std::size_t row_bytes = static_cast<std::size_t>(columns) * sizeof(T);
  const Kept kept{
      philox_key(context.seed, line.target + ".noise"), static_cast<float>(repeated.noise), 1.0f, {}};
  std::vector<float> numbers(static_cast<std::size_t>(columns));
  for (std::int64_t r = rows.begin; r < rows.end; ++r, out += columns) {
    const auto source = static_cast<std::uint64_t>(r % repeated.rows);
    context.source.read(repeated.from, source * row_bytes, {reinterpret_cast<std::byte*>(out), row_bytes});
    if (r >= repeated.rows && !kept.bitwise())
      change_kept(kept, r * columns, numbers, out, [](std::int64_t) { return true; });
  }
}

template <class T>
void fill_matrix(const RecipeLine& line, const GivenRows& given, Rows rows, const FillContext& context,
                 T* out) {
  UPMOE_CHECK(given.values != nullptr, "{}: no tokens were looked at", line.target);
  const std::int64_t columns = line.columns();
  const std::uint64_t key = philox_key(context.seed, line.target + ".noise");
  const auto noise = static_cast<float>(given.noise);
  std::vector<float> numbers(static_cast<std::size_t>(columns), 0.0f);
  for (std::int64_t r = rows.begin; r < rows.end; ++r, out += columns) {
    if (noise > 0) normal_batch(key, static_cast<std::uint64_t>(r * columns), columns, numbers.data());
    const float* values = given.values->data() + r * columns;
    for (std::int64_t c = 0; c < columns; ++c)
      out[c] = from_float<T>(values[c] + noise * numbers[static_cast<std::size_t>(c)]);
  }
}

template <class T>
void fill_matrix(const RecipeLine& line, const FreshInit& init, Rows rows, const FillContext& context,
                 T* out) {
  const std::int64_t columns = line.columns();
  const std::uint64_t key = philox_key(context.seed, line.target);
  // A uniform's deviation is this / sqrt 3.
  const float half_width = static_cast<float>(init.std * std::sqrt(3.0));
  std::vector<float> numbers(static_cast<std::size_t>(columns));
  for (std::int64_t r = rows.begin; r < rows.end; ++r, out += columns) {
    const std::int64_t first = r / init.rows_per_draw * columns;
    switch (init.kind) {
      case FreshInit::Kind::kConstant:
        std::fill(out, out + columns, from_float<T>(static_cast<float>(init.constant)));
        break;
      case FreshInit::Kind::kNormal:
        draw({key, 0.0f, static_cast<float>(init.std), 1.0f}, first, numbers, out);
        break;
      case FreshInit::Kind::kUniform:
        for (std::int64_t i = 0; i < columns; ++i) {
          const float u = uniform_from_bits(philox(key, static_cast<std::uint64_t>(first + i))[0]);
          out[i] = from_float<T>(half_width * (2.0f * u - 1.0f));
        }
        break;
    }
  }
}

}  // namespace

void fill(const RecipeLine& line, std::int64_t begin, std::int64_t end, const FillContext& context,
          std::span<std::byte> out) {
  UPMOE_CHECK(0 <= begin && begin <= end && end <= line.rows(), "rows {} to {} of {}", begin, end,
              line.rows());
  const std::size_t bytes =
      static_cast<std::size_t>((end - begin) * line.columns()) * size_of(context.source.dtype());
  UPMOE_CHECK(out.size() == bytes, "{}: {} bytes for {}", line.target, out.size(), bytes);
  const Rows rows{begin, end};
  std::visit(
      [&](const auto& transform) {
        if (context.source.dtype() == DType::kBF16) {
          fill_matrix(line, transform, rows, context, reinterpret_cast<bf16*>(out.data()));
        } else {
          fill_matrix(line, transform, rows, context, reinterpret_cast<float*>(out.data()));
        }
      },
      line.transform);
}

void fill_bytes(const RecipeLine& line, std::uint64_t begin, std::uint64_t end, const FillContext& context,
                std::span<std::byte> out) {
  UPMOE_CHECK(begin <= end && out.size() == end - begin, "{}: bytes {} to {}", line.target, begin, end);
  const std::uint64_t row_bytes =
      static_cast<std::uint64_t>(line.columns()) * size_of(context.source.dtype());
  std::vector<std::byte> cut_row;
  while (begin < end) {
    // A stretch of bytes is whole rows with a part of one before and behind them. fill() makes whole rows, so a cut one
    // is made aside and copied in part; the other part is in the next stretch, which makes it again.
    const std::uint64_t row = begin / row_bytes, skip = begin % row_bytes;
    const std::uint64_t whole_rows = skip == 0 ? (end - begin) / row_bytes : 0;
    std::uint64_t bytes = whole_rows * row_bytes;
    if (whole_rows > 0) {
      fill(line, static_cast<std::int64_t>(row), static_cast<std::int64_t>(row + whole_rows), context,
           out.first(bytes));
    } else {
      cut_row.resize(row_bytes);
      fill(line, static_cast<std::int64_t>(row), static_cast<std::int64_t>(row + 1), context, cut_row);
      bytes = std::min(row_bytes - skip, end - begin);
      std::memcpy(out.data(), cut_row.data() + skip, bytes);
    }
    begin += bytes;
    out = out.subspan(bytes);
  }
}

}  // namespace upmoe
