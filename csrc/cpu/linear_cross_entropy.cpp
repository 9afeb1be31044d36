// Linear cross-entropy on the CPU: mmkern/ops/linear_cross_entropy/reference.py specifies it.
//
// Only labelled rows are touched. Logits are made transposed, a strip of the vocabulary by a block
// of rows at a time: Sᵀ = weight · hiddenᵀ reads the weight as it lies in memory, and a vector lane
// is a row, so that sums over the vocabulary need no shuffles. Exponentials are taken against a
// reference that is fixed for each row before the pass: the largest logit of the first strip. What
// was kept of them is then a matrix Pᵀ of which the gradients are products, with factors that
// belong to rows alone:
//   d_weight = Pᵀ · (factor ∘ hidden),   d_hidden = factor ∘ (P · weight).
// 16-bit P keeps its relative precision at any distance from the reference: bf16 has fp32's range.
#include "linear_cross_entropy.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <array>
#include <tuple>

namespace mmkern {
namespace {

using at::BFloat16;

constexpr int64_t DEPTH = 256;         // rows that one product of d_weight sums over
constexpr int64_t ROWS = 1024;         // rows in a band of the backward
constexpr int64_t SHARE = 32;          // rows of d_hidden that a worker takes at a time
constexpr int64_t SCRATCH = 16 << 20;  // bytes of a chunk in the backward

template <class T>
class Forward {
 public:
  using A = Accumulator<T>;

  Forward(const Problem<T>& p, const Kept<T>& kept, A* positives)
      : p_(p), kept_(kept), positives_(positives), reference_(p.padded, kInf<A>),
        buffers_(at::empty({p.workers, VOCABULARY, p.depth}, p.options())),
        logits_(at::empty({p.workers, VOCABULARY, BLOCK}, p.options(true))) {
    top(1);
    if (!pass()) {
      top(p_.strips);
      pass();
    }
    if (kept_.blocks > 0) std::copy(reference_.begin(), reference_.end(), kept_.reference);
  }

  // log-sum-exp of a row's logits but the label's
  A negatives(int64_t row) const {
    return reference_[row] + static_cast<A>(std::log(sums_[row]));
  }

 private:
  // f(strip, block, tile of logits) for all blocks of the first `strips` strips
  template <class F>
  void sweep(int64_t strips, F f) {
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      const int64_t worker = at::get_thread_num();
      T* buffer = buffers_.mutable_data_ptr<T>() + worker * VOCABULARY * p_.depth;
      A* tile = logits_.mutable_data_ptr<A>() + worker * VOCABULARY * BLOCK;
      for (int64_t s = begin; s < end; ++s) {
        const auto left = p_.load_strip(s, buffer);
        for (int64_t b = 0; b < p_.blocks; ++b) {
          p_.logits(s, left, b, tile, [&](int64_t row, A x) {
            positives_[row] = x == kInf<A> ? std::numeric_limits<A>::quiet_NaN() : x;
          });
          f(worker, s, b, tile);
        }
      }
      tile_release();
    });
  }

  // Each row's reference: its largest logit in the first `strips` strips.
  void top(int64_t strips) {
    std::vector<A> tops(p_.workers * p_.padded, -kInf<A>);
    sweep(strips, [&](int64_t worker, int64_t s, int64_t b, const A* tile) {
      simd<Largest, A>(tile, p_.count(s), p_.lanes(b), &tops[worker * p_.padded + b * BLOCK]);
    });
    for (int64_t i = 0; i < p_.rows; ++i) {
      A most = -kInf<A>;
      for (int64_t w = 0; w < p_.workers; ++w) most = std::max(most, tops[w * p_.padded + i]);
      reference_[i] = most == -kInf<A> ? 0 : most;
    }
  }

  // Exponentials against the references. False if one was so far off that digits are lost.
  bool pass() {
    std::vector<double> sums(p_.workers * p_.padded, 0.0);
    sweep(p_.strips, [&](int64_t worker, int64_t s, int64_t b, const A* tile) {
      T* out = b < kept_.blocks ? kept_.strip(s) + b * BLOCK : nullptr;
      simd<Exponentials, T>(tile, p_.count(s), p_.lanes(b), &reference_[b * BLOCK],
                            &sums[worker * p_.padded + b * BLOCK], out, kept_.ld);
    });
    sums_.assign(p_.rows, 0.0);
    bool fits = true;
    for (int64_t i = 0; i < p_.rows; ++i) {
      for (int64_t w = 0; w < p_.workers; ++w) sums_[i] += sums[w * p_.padded + i];
      fits = fits && sums_[i] > 0.5 && sums_[i] < 1e26;
    }
    return fits;
  }

  const Problem<T>& p_;
  const Kept<T>& kept_;
  A* positives_;
  std::vector<A> reference_;
  std::vector<double> sums_;
  at::Tensor buffers_, logits_;  // of each worker: a copied strip, a tile
};

template <class T>
class Backward {
 public:
  using A = Accumulator<T>;

  Backward(const Problem<T>& p, const Kept<T>& kept, const at::Tensor& weight, const A* grad,
           const A* negatives, const A* positives, double smoothing, std::array<bool, 3> wanted,
           at::Tensor d_weight, at::Tensor d_bias)
      : p_(p), kept_(kept), wanted_(wanted), smoothing_(static_cast<A>(smoothing)),
        factor_(p.padded, A(0)), reference_(p.padded, kInf<A>), label_(p.rows), grad_(p.rows),
        d_weight_(d_weight), d_bias_(d_bias) {
    for (int64_t i = 0; i < p.rows; ++i) {
      const A negative = negatives[p.index[i]], positive = positives[p.index[i]];
      const A most = std::max(negative, positive);
      A lse = most + std::log1p(std::exp(std::min(negative, positive) - most));
      if (negative == -kInf<A> || std::isnan(positive)) lse = positive;
      const A g = grad_[i] = grad[p.index[i]];
      // The label's weight: p - 1 + ε without the difference.
      label_[i] = g * (smoothing_ - 1 / (1 + std::exp(positive - negative)));
      reference_[i] = lse;
      factor_[i] = g;
      if (i / BLOCK < kept.blocks) {
        factor_[i] = negative == -kInf<A> ? 0 : g * std::exp(kept.reference[i] - lse);
      }
    }
    if (smoothing > 0) {
      uniform();
      mean_weight_ = p.mean_weight(weight);
    }
    run();
  }

  // factor ∘ (P · weight), with the label's term and the uniform one
  void d_hidden(const at::Tensor& weight, at::Tensor out) const {
    at::Tensor rows = d_rows_.narrow(0, 0, p_.rows);
    std::vector<int64_t> labels(p_.rows);
    for (const auto& [label, row] : p_.by_label) labels[row] = label;
    at::parallel_for(0, p_.rows, SHARE, [&](int64_t begin, int64_t end) {
      const at::Tensor chosen = at::from_blob(labels.data() + begin, {end - begin}, at::kLong);
      const at::Tensor own = at::index_select(weight, 0, chosen).to(p_.options(true)).contiguous();
      const A* w = own.const_data_ptr<A>();
      for (int64_t i = begin; i < end; ++i) {
        A* row = rows.mutable_data_ptr<A>() + i * p_.width;
        const A* of_label = w + (i - begin) * p_.width;
        for (int64_t d = 0; d < p_.width; ++d) {
          row[d] = factor_[i] * row[d] + label_[i] * of_label[d];
        }
        if (smoothing_ > 0) {
          for (int64_t d = 0; d < p_.width; ++d) row[d] -= smoothing_ * grad_[i] * mean_weight_[d];
        }
      }
    });
    const at::Tensor index =
        at::from_blob(const_cast<int64_t*>(p_.index.data()), {p_.rows}, at::kLong);
    out.index_copy_(0, index, rows.to(out.scalar_type()));
  }

 private:
  // Σ_i grad_i h_i / V and Σ_i grad_i / V
  void uniform() {
    mean_hidden_.assign(p_.width, 0);
    const T* h = p_.values.template const_data_ptr<T>();
    for (int64_t i = 0; i < p_.rows; ++i) {
      for (int64_t d = 0; d < p_.width; ++d) {
        mean_hidden_[d] += grad_[i] * static_cast<A>(h[i * p_.width + d]) / p_.vocabulary;
      }
      mean_grad_ += grad_[i] / p_.vocabulary;
    }
  }

  // Chunks of the vocabulary, and in each the bands of rows: P of a band and a chunk is formed (or
  // found) by strips, which gives their part of d_weight, and then d_hidden by rows.
  void run() {
    const int64_t width = p_.width, band_rows = std::min(ROWS, p_.padded);
    const int64_t bands = (p_.padded + ROWS - 1) / ROWS;
    const bool direct = d_weight_.scalar_type() == p_.options(true).dtype().toScalarType();
    // Workers meet twice a chunk, so chunks are as large as their scratch may be.
    const int64_t column = (band_rows + width) * sizeof(T) + (bands > 1) * width * sizeof(A);
    const int64_t fitting = SCRATCH / (VOCABULARY * column);
    const int64_t chunk = std::min(std::max(fitting, 4 * p_.workers), p_.strips);
    chunk_ = chunk * VOCABULARY;
    buffers_ = at::empty({chunk, VOCABULARY, p_.depth}, p_.options());
    logits_ = at::empty({p_.workers, VOCABULARY, BLOCK}, p_.options(true));
    weights_ = at::empty({p_.workers, VOCABULARY, DEPTH}, p_.options());
    if (wanted_[0]) {
      d_rows_ = at::empty({p_.padded, width}, p_.options(true));
      rows_ = at::empty({band_rows, chunk_}, p_.options());
      if (PAIR<T> > 1) {
        pairs_ = at::empty({chunk, VOCABULARY, width}, p_.options());
      }
    }
    if (wanted_[1]) {
      scaled();
      if (!direct) sums_ = at::empty({bands > 1 ? chunk : p_.workers, VOCABULARY, width},
                                     p_.options(true));
    }
    for (int64_t first = 0; first < p_.strips; first += chunk) {
      const int64_t last = std::min(first + chunk, p_.strips);
      for (int64_t band = 0; band < bands; ++band) {
        const int64_t row = band * ROWS, rows = std::min(ROWS, p_.padded - row);
        at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
          const int64_t worker = at::get_thread_num();
          for (int64_t s = begin; s < end; ++s) {
            A* sums = nullptr;
            if (wanted_[1]) {
              sums = direct ? d_weight_.mutable_data_ptr<A>() + s * VOCABULARY * width
                            : sums_.mutable_data_ptr<A>() +
                                  (bands > 1 ? s - first : worker) * VOCABULARY * width;
            }
            strip(s, s - first, worker, row, rows, sums);
            if (band == bands - 1) finish(s, sums, direct);
          }
          tile_release();
        });
        if (wanted_[0]) by_rows(first, last, row, rows);
      }
    }
  }

  // hidden with the rows' factors, as a right operand
  void scaled() {
    at::Tensor rows = at::empty({p_.rows, p_.width}, p_.options());
    scaled_ = at::empty({p_.padded, p_.width}, p_.options());
    const T* h = p_.values.template const_data_ptr<T>();
    T* to = rows.mutable_data_ptr<T>();
    at::parallel_for(0, p_.rows, SHARE, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t d = 0; d < p_.width; ++d) {
          to[i * p_.width + d] = T(static_cast<A>(h[i * p_.width + d]) * factor_[i]);
        }
      }
    });
    interleave(to, p_.width, p_.rows, p_.padded, p_.width, scaled_.mutable_data_ptr<T>());
  }

  void strip(int64_t s, int64_t slot, int64_t worker, int64_t row, int64_t rows, A* sums) {
    const int64_t count = p_.count(s), width = p_.width;
    T* buffer = buffers_.mutable_data_ptr<T>() + slot * VOCABULARY * p_.depth;
    const auto left = p_.load_strip(s, buffer);
    if (wanted_[0] && row == 0) {
      if constexpr (PAIR<T> > 1) {
        interleave(left.first, left.second, count, round_up(count, PAIR<T>), width,
                   pairs_.mutable_data_ptr<T>() + slot * VOCABULARY * width);
      }
    }
    // Parts that are kept, or made, as a whole.
    const int64_t middle = kept_.blocks * BLOCK;
    for (int64_t r = row, next; r < row + rows; r = next) {
      next = std::min(r + DEPTH, row + rows);
      if (r < middle) next = std::min(next, middle);
      const T* p = kept_.strip(s) + r;
      int64_t ld = kept_.ld;
      if (r >= middle) {
        T* made = weights_.mutable_data_ptr<T>() + worker * VOCABULARY * DEPTH;
        make(s, left, worker, r, next, made);
        p = made;
        ld = DEPTH;
      }
      if (wanted_[1]) {
        product(count, width, next - r, ld, width, width, r > 0, p,
                scaled_.template const_data_ptr<T>() + r * width, sums);
      }
      if (wanted_[2]) {
        simd<Weighted, T>(p, ld, count, next - r, &factor_[r],
                          d_bias_.mutable_data_ptr<A>() + s * VOCABULARY);
      }
      if (wanted_[0]) {
        T* out = rows_.mutable_data_ptr<T>() + (r - row) * chunk_ + slot * VOCABULARY;
        transpose(p, ld, count, next - r, out, chunk_);
        if (count % PAIR<T>) {
          for (int64_t i = 0; i < next - r; ++i) out[i * chunk_ + count] = T(0);
        }
      }
    }
  }

  // softmax of a strip and rows from `row` to `end`, transposed; 0 at the labels
  void make(int64_t s, std::pair<const T*, int64_t> left, int64_t worker, int64_t row, int64_t end,
            T* out) {
    double ignored[BLOCK] = {};
    A* tile = logits_.mutable_data_ptr<A>() + worker * VOCABULARY * BLOCK;
    for (int64_t r = row; r < end; r += BLOCK) {
      p_.logits(s, left, r / BLOCK, tile, [](int64_t, A) {});
      simd<Exponentials, T>(tile, p_.count(s), p_.lanes(r / BLOCK), &reference_[r], ignored,
                            out + r - row, DEPTH);
    }
  }

  // d_weight and d_bias of a strip: the labels' terms, the uniform one, the output's dtype
  void finish(int64_t s, A* sums, bool direct) {
    const int64_t count = p_.count(s), width = p_.width;
    if (wanted_[2]) {
      A* out = d_bias_.mutable_data_ptr<A>() + s * VOCABULARY;
      p_.labels(s, [&](int64_t v, int64_t row) { out[v] += label_[row]; });
      for (int64_t v = 0; v < count; ++v) out[v] -= smoothing_ * mean_grad_;
    }
    if (!wanted_[1]) return;
    const T* h = p_.values.template const_data_ptr<T>();
    p_.labels(s, [&](int64_t v, int64_t row) {
      for (int64_t d = 0; d < width; ++d) {
        sums[v * width + d] += label_[row] * static_cast<A>(h[row * width + d]);
      }
    });
    if (smoothing_ > 0) {
      for (int64_t v = 0; v < count; ++v) {
        for (int64_t d = 0; d < width; ++d) sums[v * width + d] -= smoothing_ * mean_hidden_[d];
      }
    }
    if (!direct) {
      d_weight_.narrow(0, s * VOCABULARY, count)
          .copy_(at::from_blob(sums, {count, width}, p_.options(true)));
    }
  }

  void by_rows(int64_t first, int64_t last, int64_t row, int64_t rows) {
    const int64_t width = p_.width;
    at::parallel_for(0, (rows + SHARE - 1) / SHARE, 1, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) {
        const int64_t r = share * SHARE, count = std::min(SHARE, rows - r);
        A* out = d_rows_.mutable_data_ptr<A>() + (row + r) * width;
        for (int64_t s = first; s < last; ++s) {
          const int64_t slot = s - first;
          const T* packed = PAIR<T> > 1 ? pairs_.const_data_ptr<T>() : buffers_.const_data_ptr<T>();
          std::pair right(packed + slot * VOCABULARY * width, width);
          if (PAIR<T> == 1) right = p_.strip(s, right.first);
          product(count, width, round_up(p_.count(s), PAIR<T>), chunk_, right.second, width, s > 0,
                  rows_.const_data_ptr<T>() + r * chunk_ + slot * VOCABULARY, right.first, out);
        }
      }
      tile_release();
    });
  }

  const Problem<T>& p_;
  const Kept<T>& kept_;
  const std::array<bool, 3> wanted_;
  const A smoothing_;
  std::vector<A> factor_;     // of a row's P: grad, and what its reference is short of
  std::vector<A> reference_;  // log-sum-exp, for what was not kept
  std::vector<A> label_;      // grad (p - 1 + ε)
  std::vector<A> grad_;
  std::vector<A> mean_weight_, mean_hidden_;
  A mean_grad_ = 0;
  int64_t chunk_ = 0;
  at::Tensor d_weight_, d_bias_;
  at::Tensor d_rows_;   // [padded, width]
  at::Tensor scaled_;   // factor ∘ hidden: [padded / PAIR][width][PAIR]
  at::Tensor rows_;     // P of a band and a chunk: [rows, chunk]
  at::Tensor pairs_;    // a chunk of the weight: [strips][VOCABULARY / PAIR][width][PAIR]
  at::Tensor buffers_;  // copied strips of a chunk
  at::Tensor sums_;     // d_weight of strips, where its dtype is another
  at::Tensor logits_, weights_;  // of each worker: a tile; Pᵀ of a strip by DEPTH rows
};

// f(T()) with the type that products of this dtype take.
template <class F>
auto with_operand(at::ScalarType dtype, F f) {
  if (use_brgemm(dtype)) return f(BFloat16());
  if (dtype == at::kDouble) return f(double());
  return f(float());
}

// Memory safety only: what the public function checks for users is checked in Python.
void check(const char* op, const at::Tensor& hidden, const at::Tensor& weight,
           const at::Tensor& labels, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1), op,
              ": hidden [M, H] and weight [V, H] expected, got ", hidden.sizes(), " and ",
              weight.sizes());
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type() &&
                  at::isFloatingType(hidden.scalar_type()),
              op, ": one floating point dtype expected, got ", hidden.scalar_type(), " and ",
              weight.scalar_type());
  TORCH_CHECK(labels.dim() == 1 && labels.size(0) == hidden.size(0) &&
                  labels.scalar_type() == at::kLong,
              op, ": labels must be Long [", hidden.size(0), "], got ", labels.scalar_type(), " ",
              labels.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_cpu()), op,
              ": bias must be [", weight.size(0), "] on the CPU");
  TORCH_CHECK(hidden.is_cpu() && weight.is_cpu() && labels.is_cpu(), op, ": CPU tensors expected");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_fwd(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
    const std::optional<at::Tensor>& bias, int64_t ignore_index, bool mean, int64_t kept_bytes) {
  const char* op = "linear_cross_entropy_fwd";
  check(op, hidden, weight, labels, bias);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return with_operand(hidden.scalar_type(), [&](auto operand) {
    using T = decltype(operand);
    using A = Accumulator<T>;
    const Problem<T> p(op, hidden, weight, labels, bias, ignore_index);
    const int64_t count = hidden.size(0);
    at::Tensor negatives = at::full({count}, -kInf<A>, p.options(true));
    at::Tensor positives = at::zeros({count}, p.options(true));
    at::Tensor means = at::zeros({mean ? count : 0}, p.options(true));
    const at::Tensor bytes = at::empty({kept_bytes}, at::kByte);
    if (p.rows > 0) {
      const Kept<T> kept(p, bytes);
      std::vector<A> labelled(p.rows);
      const Forward<T> forward(p, kept, labelled.data());
      for (int64_t i = 0; i < p.rows; ++i) {
        negatives.mutable_data_ptr<A>()[p.index[i]] = forward.negatives(i);
        positives.mutable_data_ptr<A>()[p.index[i]] = labelled[i];
      }
      if (mean) {
        const std::vector<A> found = p.means(weight);
        for (int64_t i = 0; i < p.rows; ++i) means.mutable_data_ptr<A>()[p.index[i]] = found[i];
      }
    }
    return std::tuple(negatives, positives, means, bytes);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_bwd(
    const at::Tensor& grad, const at::Tensor& hidden, const at::Tensor& weight,
    const at::Tensor& labels, const std::optional<at::Tensor>& bias, const at::Tensor& negatives,
    const at::Tensor& positives, const at::Tensor& bytes, int64_t ignore_index, double smoothing,
    std::array<bool, 3> wanted) {
  const char* op = "linear_cross_entropy_bwd";
  check(op, hidden, weight, labels, bias);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return with_operand(hidden.scalar_type(), [&](auto operand) {
    using T = decltype(operand);
    using A = Accumulator<T>;
    const Problem<T> p(op, hidden, weight, labels, bias, ignore_index);
    for (const at::Tensor& rows : {grad, negatives, positives}) {
      TORCH_CHECK(rows.is_cpu() && rows.dim() == 1 && rows.size(0) == hidden.size(0) &&
                      rows.scalar_type() == p.options(true).dtype().toScalarType(),
                  op, ": grad, negatives and positives must be ", p.options(true).dtype(), " [",
                  hidden.size(0), "], got ", rows.scalar_type(), " ", rows.sizes());
    }
    TORCH_CHECK(bytes.is_cpu() && bytes.scalar_type() == at::kByte && bytes.is_contiguous(), op,
                ": kept must be contiguous bytes");
    const auto make = [&](bool want, at::IntArrayRef sizes, at::ScalarType dtype) {
      const auto options = at::TensorOptions().dtype(dtype);
      if (!want) return at::empty({0}, options);
      return p.rows > 0 ? at::empty(sizes, options) : at::zeros(sizes, options);
    };
    const auto dtype = hidden.scalar_type();
    at::Tensor d_hidden = wanted[0] ? at::zeros(hidden.sizes(), dtype) : at::empty({0}, dtype);
    at::Tensor d_weight = make(wanted[1], weight.sizes(), dtype);
    at::Tensor d_bias = at::zeros({wanted[2] ? p.vocabulary : 0}, p.options(true));
    if (p.rows > 0) {
      const at::Tensor g = grad.contiguous();
      const Kept<T> kept(p, bytes);
      const Backward<T> backward(p, kept, weight, g.const_data_ptr<A>(),
                                 negatives.contiguous().template const_data_ptr<A>(),
                                 positives.contiguous().template const_data_ptr<A>(), smoothing,
                                 wanted, d_weight, d_bias);
      if (wanted[0]) backward.d_hidden(weight, d_hidden);
    }
    return std::tuple(d_hidden, d_weight, d_bias.to(bias ? bias->scalar_type() : dtype));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("linear_cross_entropy_fwd", &linear_cross_entropy_fwd);
  m.impl("linear_cross_entropy_bwd", &linear_cross_entropy_bwd);
}

}  // namespace mmkern
