// InfoNCE on the CPU: mmkern/ops/info_nce/reference.py is the specification.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <tuple>

#include "simd.h"
#include "tiles.h"

namespace mmkern {
namespace {

// Running log-sum-exp as (maximum m, sum l of e^(x - m)). No term yet is (-inf, 0). Exponents are
// taken against 0 where the maximum is -inf, so that e^(-inf) = 0 and not NaN.
template <class V>
MMKERN_INLINE V finite_reference(V maximum) {
  return maximum == -kInf<std::remove_reference_t<decltype(maximum[0])>> ? V{} : maximum;
}

// How far below the reference a maximum (or log-sum-exp) may lie for one exponential to serve both
// directions. What underflows at 60 is below e^-27 of what it is missing from, but the exponents
// are rounded relative to the distance: fp32 features would show that, 16-bit ones hide it.
float spread(const at::Tensor& features) { return features.element_size() > 2 ? 8 : 60; }

// A block's row statistics; its columns' are merged into theirs. e^(x - m) with the block's maximum
// m serves rows and columns alike if every row and column comes near m; else each has its own.
struct Statistics {
  template <class T, int W>
  static MMKERN_INLINE void run(const Block<T>& b, T scale, T spread, T* row_max, T* row_sum,
                                T* column_max, T* column_sum) {
    using V = Vector<T, W>;
    const int64_t width = b.width();
    const V least = fill<T, W>(-kInf<T>);
    T top[STRIP], sums[STRIP];
    for (int64_t j = 0; j < width; j += W) {
      store(top + j, least);
      store(sums + j, V{});
    }
    T maximum = -kInf<T>, lowest = kInf<T>;
    for (int64_t i = 0; i < b.rows; ++i) {
      const T* s = b.s + i * b.ld;
      V row = least;
      for (int64_t j = 0; j < width; j += W) {
        const V x = load<T, W>(s + j) * scale;
        row = larger(x, row);
        store(top + j, larger(x, load<T, W>(top + j)));
      }
      row_max[i] = largest<T, W>(row);
      maximum = std::max(maximum, row_max[i]);
      lowest = std::min(lowest, row_max[i]);
    }
    for (int64_t j = 0; j < b.columns; ++j) lowest = std::min(lowest, top[j]);

    if (maximum - lowest <= spread) {
      for (int64_t i = 0; i < b.rows; ++i) {
        const T* s = b.s + i * b.ld;
        V sum{};
        for (int64_t j = 0; j < width; j += W) {
          const V e = exponential<W>(load<T, W>(s + j) * scale - maximum);
          sum += e;
          store(sums + j, load<T, W>(sums + j) + e);
        }
        row_max[i] = maximum;
        row_sum[i] = total<T, W>(sum);
      }
      for (int64_t j = 0; j < width; j += W) store(top + j, fill<T, W>(maximum));
    } else {
      for (int64_t i = 0; i < b.rows; ++i) {
        const T* s = b.s + i * b.ld;
        const V reference = finite_reference(fill<T, W>(row_max[i]));
        V sum{};
        for (int64_t j = 0; j < width; j += W) {
          const V x = load<T, W>(s + j) * scale;
          const V e = exponential<W>(x - finite_reference(load<T, W>(top + j)));
          sum += exponential<W>(x - reference);
          store(sums + j, load<T, W>(sums + j) + e);
        }
        row_sum[i] = total<T, W>(sum);
      }
    }
    merge<T, W>(column_max, column_sum, top, sums, width);
  }

  // (m, l) of `count` rows or columns, a multiple of LANES, merged with another part's.
  template <class T, int W>
  static MMKERN_INLINE void merge(T* m, T* l, const T* part_m, const T* part_l, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
      const auto a = load<T, W>(m + i), b = load<T, W>(part_m + i);
      const auto maximum = larger(a, b), reference = finite_reference(maximum);
      store(l + i, load<T, W>(l + i) * exponential<W>(a - reference) +
                       load<T, W>(part_l + i) * exponential<W>(b - reference));
      store(m + i, maximum);
    }
  }
};

struct Merge {
  template <class T, int W>
  static MMKERN_INLINE void run(T* m, T* l, const T* part_m, const T* part_l, int64_t count) {
    Statistics::merge<T, W>(m, l, part_m, part_l, count);
  }
};

template <class T>
class Forward {
 public:
  Forward(const Geometry& g, T scale, T spread, int64_t offset, at::Tensor diagonal)
      : scale_(scale), spread_(spread), offset_(offset), band_(g.band),
        rows_(state(round_up(g.rows, BLOCK), diagonal)),
        columns_(state(round_up(g.columns, STRIP), diagonal)),
        parts_(at::empty({g.chunk / STRIP, 2, g.band}, diagonal.options())),
        diagonal_(diagonal.mutable_data_ptr<T>()) {}

  void block(const Block<T>& b, int64_t strip, int64_t row) {
    const bool masked = mask<T>(b, scale_, 0, offset_, diagonal_);
    T* part = this->part(strip) + row;
    T* column = columns_.mutable_data_ptr<T>() + b.column;
    simd<Statistics, T>(b, masked ? T(1) : scale_, spread_, part, part + band_, column,
                        column + columns_.size(1));
  }

  // Strips in order: the result does not depend on which thread had which.
  void finish(const Tile& t) {
    const int64_t blocks = round_up(t.rows, BLOCK) / BLOCK;
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      T* m = rows_.mutable_data_ptr<T>() + t.row + begin * BLOCK;
      for (int64_t strip = 0; strip < t.strips(); ++strip) {
        const T* part = this->part(strip) + begin * BLOCK;
        simd<Merge, T>(m, m + rows_.size(1), part, part + band_, (end - begin) * BLOCK);
      }
    });
  }

  at::Tensor row_lse(int64_t count) const { return lse(rows_, count); }
  at::Tensor column_lse(int64_t count) const { return lse(columns_, count); }

 private:
  T* part(int64_t strip) { return parts_.mutable_data_ptr<T>() + strip * 2 * band_; }

  static at::Tensor state(int64_t count, const at::Tensor& like) {
    at::Tensor both = at::zeros({2, count}, like.options());
    both[0].fill_(-kInf<T>);
    return both;
  }

  static at::Tensor lse(const at::Tensor& state, int64_t count) {
    const T* m = state.const_data_ptr<T>();
    const T* l = m + state.size(1);
    at::Tensor out = at::empty({count}, state.options());
    T* to = out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < count; ++i) to[i] = (m[i] == -kInf<T> ? 0 : m[i]) + std::log(l[i]);
    return out;
  }

  T scale_, spread_;
  int64_t offset_, band_;
  at::Tensor rows_, columns_;  // [2, count]: m and l
  at::Tensor parts_;           // [strips, 2, band]: m and l of a tile's rows
  T* diagonal_;
};

// Logits become W_ij = exp(S_ij - row_lse_i) + exp(S_ij - column_lse_j). With the block's largest
// log-sum-exp m that is e^(S_ij - m) (e^(m - row_lse_i) + e^(m - column_lse_j)): one exponential an
// element, if the block's log-sum-exps lie near m. Those of unlabelled columns, +inf, give 0.
struct Weights {
  template <class T, int W>
  static MMKERN_INLINE void run(const Block<T>& b, T scale, T spread, const T* row_lse,
                                const T* column_lse) {
    using V = Vector<T, W>;
    const int64_t width = b.width();
    T m = -kInf<T>, lowest = kInf<T>;
    const auto include = [&](const T* lse, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        if (lse[i] < kInf<T>) m = std::max(m, lse[i]);
        lowest = std::min(lowest, lse[i]);
      }
    };
    include(row_lse, b.rows);
    include(column_lse, b.columns);
    if (lowest <= m && m - lowest <= spread) {
      T columns[STRIP];
      for (int64_t j = 0; j < width; j += W) {
        store(columns + j, exponential<W>(m - load<T, W>(column_lse + j)));
      }
      for (int64_t i = 0; i < b.rows; ++i) {
        T* s = b.s + i * b.ld;
        const V row = exponential<W>(fill<T, W>(m - row_lse[i]));
        for (int64_t j = 0; j < width; j += W) {
          const V e = exponential<W>(load<T, W>(s + j) * scale - m);
          store(s + j, e * (row + load<T, W>(columns + j)));
        }
      }
      return;
    }
    for (int64_t i = 0; i < b.rows; ++i) {
      T* s = b.s + i * b.ld;
      for (int64_t j = 0; j < width; j += W) {
        const V x = load<T, W>(s + j) * scale;
        store(s + j, exponential<W>(x - row_lse[i]) +
                         exponential<W>(x - load<T, W>(column_lse + j)));
      }
    }
  }
};

template <class T>
class Backward {
 public:
  Backward(const Geometry& g, T scale, T spread, const at::Tensor& row_lse,
           const at::Tensor& column_lse, int64_t offset)
      : scale_(scale), spread_(spread), offset_(offset), row_lse_(row_lse.contiguous()),
        column_lse_(at::zeros({round_up(g.columns, STRIP)}, column_lse.options())) {
    column_lse_.narrow(0, 0, g.columns).copy_(column_lse);
  }

  void block(const Block<T>& b, int64_t, int64_t) {
    simd<Weights, T>(b, scale_, spread_, row_lse_.const_data_ptr<T>() + b.row,
                     column_lse_.const_data_ptr<T>() + b.column);
    b.positives(offset_, [&](int64_t i, int64_t j) { b.s[i * b.ld + j] = 0; });
  }

  void finish(const Tile&) {}

 private:
  T scale_, spread_;
  int64_t offset_;
  at::Tensor row_lse_, column_lse_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_fwd(const at::Tensor& image,
                                                            const at::Tensor& text,
                                                            const at::Tensor& scale,
                                                            int64_t offset,
                                                            const std::optional<at::Tensor>& dots) {
  check_inputs("info_nce_fwd", image, text, scale, offset, dots);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return with_tiles(image, text, {false, false}, dots, [&](auto tiles) {
    using T = typename decltype(tiles)::Scalar;
    at::Tensor diagonal = at::empty({tiles.rows}, tiles.d_image.options());
    Forward<T> epilogue(tiles, scale.item().to<T>(), spread(image), offset, diagonal);
    sweep(tiles, epilogue);
    return std::tuple(epilogue.row_lse(tiles.rows), epilogue.column_lse(tiles.columns), diagonal);
  });
}

std::tuple<at::Tensor, at::Tensor> info_nce_bwd(const at::Tensor& image, const at::Tensor& text,
                                                const at::Tensor& scale, const at::Tensor& row_lse,
                                                const at::Tensor& column_lse, int64_t offset,
                                                std::array<bool, 2> output_mask,
                                                const std::optional<at::Tensor>& dots) {
  check_inputs("info_nce_bwd", image, text, scale, offset, dots);
  const auto dtype = image.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& [lse, count] : {std::pair(row_lse, image.size(0)),
                                   std::pair(column_lse, text.size(0))}) {
    TORCH_CHECK(lse.is_cpu() && lse.scalar_type() == dtype && lse.dim() == 1 &&
                    lse.size(0) == count,
                "info_nce_bwd: log-sum-exp must be ", dtype, " [", count, "], got ",
                lse.scalar_type(), " ", lse.sizes());
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return with_tiles(image, text, output_mask, dots, [&](auto tiles) {
    using T = typename decltype(tiles)::Scalar;
    Backward<T> epilogue(tiles, scale.item().to<T>(), spread(image), row_lse, column_lse, offset);
    sweep(tiles, epilogue);
    return std::tuple(tiles.d_image, tiles.d_text);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("info_nce_fwd", &info_nce_fwd);
  m.impl("info_nce_bwd", &info_nce_bwd);
}

}  // namespace mmkern
