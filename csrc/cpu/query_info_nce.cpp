// BLIP-2's image-text contrast on the CPU: mmkern/ops/query_info_nce/reference.py is the
// specification.
//
// A band of images, all their queries, meets all texts: products (at::mm into a tile, or brgemm a
// block at a time in the workers), of which only the best query's product and its number are kept,
// [band, M]. Rows of those belong to one worker, then strips of columns do, so no sum depends on
// the number of threads. A pair's gradient reaches one query: backward adds weighted rows, which is
// 4 D operations a pair where matrix products over all queries would take 4 Q D.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <span>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "query_info_nce.h"
#include "simd.h"
#include "tiles.h"

#define VECTOR_ISA query_base
#define VECTOR_TARGET
#define VECTOR_BYTES 16
#include "query_info_nce_kernels.h"
#if defined(__x86_64__)
#define VECTOR_ISA query_avx2
#define VECTOR_TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#include "query_info_nce_kernels.h"
#define VECTOR_ISA query_avx512
#define VECTOR_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define VECTOR_BYTES 64
#include "query_info_nce_kernels.h"
#endif

namespace mmkern {
namespace {

template <class T, class X = T>
const Kernels<T, X>& kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return query_avx512::kernels<T, X>;
  if (isa() == Isa::avx2) return query_avx2::kernels<T, X>;
#endif
  return query_base::kernels<T, X>;
}

// Texts of a row's positives, ascending.
class PositivePairs {
 public:
  explicit PositivePairs(const at::Tensor& ids)
      : order_(ids.size(0)), begin_(ids.size(0)), end_(ids.size(0)) {
    const at::Tensor given = ids.contiguous();
    const int64_t* id = given.const_data_ptr<int64_t>();
    const int64_t count = given.size(0);
    std::iota(order_.begin(), order_.end(), 0);
    if (!std::is_sorted(id, id + count)) {
      std::stable_sort(order_.begin(), order_.end(),
                       [&](int64_t a, int64_t b) { return id[a] < id[b]; });
    }
    for (int64_t first = 0, last; first < count; first = last) {
      for (last = first; last < count && id[order_[last]] == id[order_[first]]; ++last) {
        begin_[order_[last]] = first;
      }
      for (int64_t k = first; k < last; ++k) end_[order_[k]] = last;
    }
  }

  Span of(int64_t row) const {
    return {order_.data() + begin_[row], order_.data() + end_[row]};
  }

  // Those among the columns [begin, end).
  Span of(int64_t row, int64_t begin, int64_t end) const {
    const Span all = of(row);
    const auto first = std::lower_bound(all.begin(), all.end(), begin);
    return {first, std::lower_bound(first, all.end(), end)};
  }

 private:
  std::vector<int64_t> order_, begin_, end_;
};

int64_t grain(int64_t work) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, work)); }

// Best queries and their products, a band of images at a time.
template <class T>
class Similarities {
 public:
  const int64_t images, queries, width, texts, band;

  Similarities(const at::Tensor& given, const at::Tensor& text)
      : images(given.size(0)), queries(given.size(1)), width(given.size(2)), texts(text.size(0)),
        band(std::max<int64_t>(1, ROWS / queries)), packed_(use_brgemm(given.scalar_type())) {
    const auto single = given.options().dtype(c10::CppTypeToScalarType<T>::value);
    if (!packed_) {
      rows_ = given.to(single.dtype()).contiguous().view({images * queries, width});
      text_ = text.to(single.dtype()).contiguous();
      // The odd leading dimension keeps rows from falling into the same cache sets.
      tile_ = at::empty({band * queries, std::min(TILE, round_up(texts, LANES)) + LANES}, single);
      return;
    }
    depth_ = round_up(width, 32);
    group_ = std::max<int64_t>(1, BLOCK / queries);
    strip_ = round_up((texts + strips() - 1) / strips(), LANES);
    rows_ = given.contiguous().view({images * queries, width});
    if (depth_ > width) rows_ = at::constant_pad_nd(rows_, {0, depth_ - width});
    text_ = at::empty({strips(), depth_ / 2, strip_, 2}, text.options());
    tile_ = at::empty({at::get_num_threads(), group_ * queries, strip_}, single);
    const at::Tensor source = text.contiguous();
    at::parallel_for(0, strips(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t first = std::min(s * strip_, texts);
        pack_columns(source.const_data_ptr<at::BFloat16>() + first * width,
                     std::min(strip_, texts - first), width, strip_, depth_,
                     text_.mutable_data_ptr<at::BFloat16>() + s * depth_ * strip_);
      }
    });
  }

  // Rows `texts` long, of images [first, first + count).
  void fill(int64_t first, int64_t count, T* dots, uint8_t* best) {
    if (packed_) return fill_packed(first, count, dots, best);
    const int64_t ld = tile_.size(1), rows = count * queries;
    const T* s = tile_.const_data_ptr<T>();
    for (int64_t column = 0; column < texts; column += TILE) {
      const int64_t columns = std::min(TILE, texts - column);
      at::Tensor out = tile_.narrow(0, 0, rows).narrow(1, 0, columns);
      at::cpu::mm_out(out, rows_.narrow(0, first * queries, rows),
                      text_.narrow(0, column, columns).t());
      const int64_t pieces = (columns + CHUNK - 1) / CHUNK;
      at::parallel_for(0, count * pieces, grain(queries * CHUNK / 4), [&](int64_t a, int64_t b) {
        for (int64_t k = a; k < b; ++k) {
          const int64_t i = k / pieces, j = k % pieces * CHUNK;
          kernels<T>().reduce(s + i * queries * ld + j, ld, queries, std::min(CHUNK, columns - j),
                              dots + i * texts + column + j, best + i * texts + column + j);
        }
      });
    }
  }

  // Whether features are kept in bf16.
  bool packed() const { return packed_; }

  // All queries in X, bf16's bits where packed, in rows a multiple of LANES long.
  template <class X>
  const X* rows() {
    const int64_t missing = ld() - rows_.size(1);
    wide_ = missing ? at::constant_pad_nd(rows_, {0, missing}) : rows_;
    return static_cast<const X*>(wide_.const_data_ptr());
  }
  int64_t ld() const { return round_up(rows_.size(1), LANES); }

 private:
  int64_t strips() const { return (texts + STRIP - 1) / STRIP; }

  void fill_packed(int64_t first, int64_t count, T* dots, uint8_t* best) {
    if constexpr (std::is_same_v<T, float>) {
      const int64_t groups = (count + group_ - 1) / group_;
      at::parallel_for(0, groups * strips(), 1, [&](int64_t a, int64_t b) {
        float* s = tile_[at::get_thread_num()].mutable_data_ptr<float>();
        for (int64_t k = a; k < b; ++k) {
          const int64_t i = k / strips() * group_, j = k % strips() * strip_;
          const int64_t members = std::min(group_, count - i), columns = std::min(strip_, texts - j);
          if (columns <= 0) continue;
          tile_gemm(members * queries, strip_, depth_, depth_, strip_, strip_, false,
                    rows_.const_data_ptr<at::BFloat16>() + (first + i) * queries * depth_,
                    text_.const_data_ptr<at::BFloat16>() + j * depth_, s);
          for (int64_t m = 0; m < members; ++m) {
            kernels<T>().reduce(s + m * queries * strip_, strip_, queries, columns,
                                dots + (i + m) * texts + j, best + (i + m) * texts + j);
          }
        }
        tile_release();
      });
    }
  }

  bool packed_;
  int64_t depth_ = 0, group_ = 0, strip_ = 0;
  at::Tensor rows_;  // [B Q, D], in T; packed: bf16, D padded
  at::Tensor text_;  // [M, D] in T; packed: [strips, D/2, strip, 2]
  at::Tensor tile_;  // products: [band Q, TILE]; packed: of each worker, [group Q, strip]
  at::Tensor wide_;  // rows_, padded to LANES
};

// f(T{}) with the type that this dtype is summed in.
template <class F>
auto with_accumulator(at::ScalarType dtype, F f) {
  return dtype == at::kDouble ? f(double{}) : f(float{});
}

void check(const char* op, const at::Tensor& queries, const at::Tensor& text,
           const at::Tensor& scale, const at::Tensor& ids, int64_t offset) {
  TORCH_CHECK(queries.dim() == 3 && queries.size(1) >= 1 && queries.size(1) <= 256, op,
              ": queries [B, Q, D] with 1 to 256 queries expected, got ", queries.sizes());
  check_inputs(op, queries.select(1, 0), text, scale, offset);
  TORCH_CHECK(ids.is_cpu() && ids.scalar_type() == at::kLong && ids.dim() == 1 &&
                  ids.size(0) == text.size(0),
              op, ": ids must be int64 [", text.size(0), "] on the CPU");
}

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
Forward forward(const at::Tensor& queries, const at::Tensor& text, T scale, const at::Tensor& ids,
                int64_t offset, bool keep, const std::optional<at::Tensor>& seed) {
  Similarities<T> similarities(queries, text);
  const PositivePairs positives(ids);
  const int64_t images = similarities.images, texts = similarities.texts, band = similarities.band;
  const int64_t padded = round_up(texts, LANES), all = images + texts;
  const auto single = queries.options().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t drawn = seed ? all : 0;
  at::Tensor stats = at::empty({FIELDS, all}, single), keys = at::empty({drawn}, single);
  at::Tensor draws = at::empty({drawn}, ids.options());
  at::Tensor dots = at::empty({keep ? images : band, texts}, single);
  at::Tensor best = at::empty({keep ? images : band, texts}, single.dtype(at::kByte));
  at::Tensor logits = at::empty({band, padded}, single);
  at::Tensor column = at::zeros({FIELDS, padded}, single);
  column[0].fill_(-kInf<T>);
  column[2].fill_(-kInf<T>);
  at::Tensor column_keys = at::full({seed ? padded : 0}, kInf<T>, single);
  std::vector<std::remove_pointer_t<decltype(Columns<T>::drawn)>> column_drawn(seed ? padded : 0,
                                                                               -1);
  Draw draw{0, offset};
  if (seed) {
    const auto value = static_cast<uint64_t>(seed->item<int64_t>());
    draw.key = static_cast<uint32_t>(value ^ (value >> 32));
  }
  const Draw* drawing = seed ? &draw : nullptr;
  const Columns<T> columns{column.mutable_data_ptr<T>(), padded, column_keys.mutable_data_ptr<T>(),
                           column_drawn.data()};
  T* out = stats.mutable_data_ptr<T>();
  T* x = logits.mutable_data_ptr<T>();
  const int64_t cost = drawing ? 8 : 2;
  for (int64_t first = 0; first < images; first += band) {
    const int64_t count = std::min(band, images - first);
    T* d = dots.mutable_data_ptr<T>() + (keep ? first * texts : 0);
    similarities.fill(first, count, d,
                      best.mutable_data_ptr<uint8_t>() + (keep ? first * texts : 0));
    at::parallel_for(0, count, grain(cost * texts), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = first + i;
        kernels<T>().row_statistics(
            d + i * texts, texts, scale, positives.of(offset + row), x + i * padded, out + row, all,
            drawing, row, drawing ? keys.mutable_data_ptr<T>() + row : nullptr,
            drawing ? draws.mutable_data_ptr<int64_t>() + row : nullptr);
      }
    });
    const int64_t pieces = (padded + PIECE - 1) / PIECE;
    at::parallel_for(0, pieces, grain(cost * count * PIECE), [&](int64_t a, int64_t b) {
      const int64_t begin = a * PIECE, end = std::min(b * PIECE, padded);
      kernels<T>().column_statistics(x, padded, count, begin, end, columns, drawing, first);
      for (int64_t i = 0; i < count; ++i) {
        for (const int64_t j : positives.of(offset + first + i, begin, end)) {
          const T logit = d[i * texts + j] * scale;
          Positives<T> p{columns.field(2)[j], columns.field(3)[j], columns.field(4)[j],
                         columns.field(5)[j]};
          p.add(logit);
          columns.field(2)[j] = p.top;
          columns.field(3)[j] = p.sum;
          columns.field(4)[j] = p.total;
          columns.field(5)[j] = p.number;
          columns.field(6)[j] += logit;
        }
      }
    });
  }
  stats.narrow(1, images, texts).copy_(column.narrow(1, 0, texts));
  if (seed) {
    keys.narrow(0, images, texts).copy_(column_keys.narrow(0, 0, texts));
    int64_t* to = draws.mutable_data_ptr<int64_t>() + images;
    for (int64_t j = 0; j < texts; ++j) to[j] = column_drawn[j] < 0 ? -1 : offset + column_drawn[j];
  }
  if (!keep) dots = at::empty({0}, single), best = at::empty({0}, best.options());
  return {stats, keys, draws, dots, best};
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

template <class T, class X>
Gradients backward(Similarities<T> similarities, const at::Tensor& queries, const at::Tensor& text, const at::Tensor& ids,
                   int64_t offset, const at::Tensor& given_stats, Weighting<T> weighting,
                   bool detach, std::array<bool, 2> wanted,
                   const std::optional<at::Tensor>& dots, const std::optional<at::Tensor>& best) {
  const PositivePairs positives(ids);
  const int64_t images = similarities.images, texts = similarities.texts, band = similarities.band;
  const int64_t count = similarities.queries, width = similarities.width;
  const int64_t padded = round_up(texts, LANES), ld = round_up(width, LANES);
  const auto single = queries.options().dtype(c10::CppTypeToScalarType<T>::value);
  const at::Tensor stats = given_stats.contiguous();
  const T* stat = stats.const_data_ptr<T>();

  at::Tensor column = at::zeros({2, padded}, single);
  std::vector<Direction<T>> directions;
  directions.reserve(texts);
  for (int64_t j = 0; j < texts; ++j) {
    directions.emplace_back(stat + images + j, images + texts);
    column.mutable_data_ptr<T>()[j] = directions[j].top;
    column.mutable_data_ptr<T>()[padded + j] = directions[j].inverse;
  }
  const Directions<T> columns{column.const_data_ptr<T>(), column.const_data_ptr<T>() + padded,
                              directions.data()};

  at::Tensor wide = text.contiguous();
  if (!similarities.packed()) wide = wide.to(single.dtype());
  if (ld > width) wide = at::constant_pad_nd(wide, {0, ld - width});
  const X* t = static_cast<const X*>(wide.const_data_ptr());
  const X* v = wanted[1] ? similarities.template rows<X>() : nullptr;
  const int64_t v_ld = similarities.ld();
  const bool direct = ld == width && queries.scalar_type() == single.dtype();
  at::Tensor d_queries =
      wanted[0] ? at::empty(queries.sizes(), queries.options()) : at::empty({0}, queries.options());
  at::Tensor sums = at::empty({wanted[0] && !direct ? band * count : 0, ld}, single);
  at::Tensor d_text = at::zeros({wanted[1] ? texts : 0, ld}, single);
  at::Tensor d_scale = at::empty({images}, single);  // of each image
  const bool keep = dots && best;
  at::Tensor d_band = at::empty({keep ? 0 : band, texts}, single);
  at::Tensor b_band = at::empty({keep ? 0 : band, texts}, single.dtype(at::kByte));
  at::Tensor row_weights = at::empty({band, padded}, single);
  at::Tensor column_weights = at::empty({detach ? band : 0, padded}, single);
  at::Tensor scratch = at::zeros({at::get_num_threads(), 2, padded}, single);
  T* row_weight = row_weights.mutable_data_ptr<T>();
  T* column_weight = detach ? column_weights.mutable_data_ptr<T>() : row_weight;

  for (int64_t first = 0; first < images; first += band) {
    const int64_t members = std::min(band, images - first);
    const T* d = keep ? dots->const_data_ptr<T>() + first * texts : d_band.const_data_ptr<T>();
    const uint8_t* b =
        keep ? best->const_data_ptr<uint8_t>() + first * texts : b_band.const_data_ptr<uint8_t>();
    if (!keep) {
      similarities.fill(first, members, d_band.mutable_data_ptr<T>(),
                        b_band.mutable_data_ptr<uint8_t>());
    }
    T* to = nullptr;
    if (wanted[0]) {
      to = direct ? d_queries.mutable_data_ptr<T>() + first * count * width
                  : sums.mutable_data_ptr<T>();
    }
    at::parallel_for(0, members, grain(texts * width / 4), [&](int64_t begin, int64_t end) {
      T* copy = scratch[at::get_thread_num()].mutable_data_ptr<T>();
      for (int64_t i = begin; i < end; ++i) {
        std::copy(d + i * texts, d + (i + 1) * texts, copy);
        d_scale.mutable_data_ptr<T>()[first + i] = kernels<T>().weights(
            copy, texts, positives.of(offset + first + i),
            Direction<T>(stat + first + i, images + texts), columns, weighting, copy + padded,
            row_weight + i * padded, detach ? column_weight + i * padded : nullptr);
      }
      if (!wanted[0]) return;
      for (int64_t j = 0; j < texts; j += CHUNK) {
        for (int64_t i = begin; i < end; ++i) {
          kernels<T, X>().query_gradient(row_weight + i * padded + j, b + i * texts + j,
                                         std::min(CHUNK, texts - j), t + j * ld, ld, count, j > 0,
                                         to + i * count * ld);
        }
      }
    });
    if (wanted[0] && !direct) {
      const at::Tensor from = sums.narrow(0, 0, members * count).narrow(1, 0, width);
      d_queries.narrow(0, first, members).copy_(from.unflatten(0, {members, count}));
    }
    if (!wanted[1]) continue;
    at::parallel_for(0, (texts + PIECE - 1) / PIECE, grain(members * PIECE * width / 8),
                     [&](int64_t begin, int64_t end) {
                       kernels<T, X>().text_gradient(
                           column_weight, padded, b, texts, members, begin * PIECE,
                           std::min(end * PIECE, texts), v + first * count * v_ld, count, v_ld, ld,
                           d_text.mutable_data_ptr<T>());
                     });
  }
  if (ld > width) d_text = d_text.narrow(1, 0, width).contiguous();
  if (!wanted[1]) d_text = at::empty({0}, single);
  T sum = 0;
  for (int64_t i = 0; i < images; ++i) sum += d_scale.const_data_ptr<T>()[i];
  return {d_queries, d_text, at::full({}, sum * weighting.constant, single)};
}

Forward query_info_nce_fwd(const at::Tensor& queries, const at::Tensor& text,
                           const at::Tensor& scale, const at::Tensor& ids, int64_t offset,
                           bool keep, const std::optional<at::Tensor>& seed) {
  check("query_info_nce_fwd", queries, text, scale, ids, offset);
  TORCH_CHECK(!seed || (seed->is_cpu() && seed->numel() == 1),
              "query_info_nce_fwd: seed must have one element on the CPU");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return with_accumulator(queries.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    return forward<T>(queries, text, scale.item().to<T>(), ids, offset, keep, seed);
  });
}

// The specification's formula, in its order.
at::Tensor query_info_nce_loss(const at::Tensor& stats, double label_smoothing, int64_t texts) {
  TORCH_CHECK(stats.is_cpu() && stats.dim() == 2 && stats.size(0) == FIELDS &&
                  (stats.scalar_type() == at::kFloat || stats.scalar_type() == at::kDouble),
              "query_info_nce_loss: stats must be fp32 or fp64 [", FIELDS, ", n], got ",
              stats.scalar_type(), " ", stats.sizes());
  const at::AutoDispatchBelowADInplaceOrView guard;
  return with_accumulator(stats.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const at::Tensor given = stats.contiguous();
    const int64_t count = given.size(1);
    const T* s = given.const_data_ptr<T>();
    double sum = 0;
    for (int64_t i = 0; i < count; ++i, ++s) {
      const T top_positive = s[2 * count], positives = s[3 * count];
      const T mean = s[4 * count] / s[5 * count];
      const T margin = s[0] - top_positive + std::log(s[count] / positives);
      const T missed = margin > 80 ? margin : std::log1p(std::exp(margin));
      T loss = missed + (top_positive - mean + std::log(positives));
      if (label_smoothing != 0) loss += T(label_smoothing) * (mean - s[6 * count] / texts);
      sum += loss;
    }
    return at::full({}, sum, given.options());
  });
}

Gradients query_info_nce_bwd(const at::Tensor& queries, const at::Tensor& text,
                             const at::Tensor& scale, const at::Tensor& ids, int64_t offset,
                             const at::Tensor& stats, const at::Tensor& grad, int64_t world,
                             double label_smoothing, bool detach_columns,
                             std::array<bool, 2> output_mask, const std::optional<at::Tensor>& dots,
                             const std::optional<at::Tensor>& best) {
  const char* op = "query_info_nce_bwd";
  check(op, queries, text, scale, ids, offset);
  const auto dtype = queries.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t images = queries.size(0), texts = text.size(0);
  TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == dtype && stats.dim() == 2 &&
                  stats.size(0) == FIELDS && stats.size(1) == images + texts,
              op, ": stats must be ", dtype, " [", FIELDS, ", ", images + texts, "], got ",
              stats.scalar_type(), " ", stats.sizes());
  TORCH_CHECK(grad.is_cpu() && grad.numel() == 1, op, ": grad must have one element");
  const auto fits = [&](const std::optional<at::Tensor>& kept, at::ScalarType type) {
    return !kept || (kept->is_cpu() && kept->scalar_type() == type && kept->is_contiguous() &&
                     kept->dim() == 2 && kept->size(0) == images && kept->size(1) == texts);
  };
  TORCH_CHECK(fits(dots, dtype) && fits(best, at::kByte), op, ": dots and best must be [", images,
              ", ", texts, "], contiguous, in ", dtype, " and uint8");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return with_accumulator(queries.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T s = scale.item().to<T>(), constant = grad.item().to<T>() * world / (2 * texts);
    const Weighting<T> weighting{s, static_cast<T>(1 - label_smoothing),
                                 static_cast<T>(label_smoothing / texts), constant, constant * s};
    Similarities<T> similarities(queries, text);
    const auto run = [&](auto feature) {
      return backward<T, decltype(feature)>(std::move(similarities), queries, text, ids, offset,
                                            stats, weighting, detach_columns, output_mask, dots,
                                            best);
    };
    if constexpr (std::is_same_v<T, float>) {
      if (similarities.packed()) return run(uint16_t{});
    }
    return run(T{});
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("query_info_nce_fwd", &query_info_nce_fwd);
  m.impl("query_info_nce_loss", &query_info_nce_loss);
  m.impl("query_info_nce_bwd", &query_info_nce_bwd);
}

}  // namespace mmkern
