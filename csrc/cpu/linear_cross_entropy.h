// What the two passes of linear cross-entropy share: the labelled rows, tiles of their logits, and
// what is kept of them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "products.h"
#include "simd.h"
#include "tiles.h"

namespace mmkern {

constexpr int64_t VOCABULARY = 128;  // columns of logits in a strip

// exp(x) as simd.h has it, in a form that compilers vectorise to the width of the function it ends
// up in.
MMKERN_INLINE float exponent(float x) {
  const float shifted = x * 1.44269504f + 12582912.f;
  const float n = shifted - 12582912.f;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  const float y = x > 88.37f ? kInf<float> : p * power;
  return x < -87.33f ? 0.f : y;
}
MMKERN_INLINE double exponent(double x) { return std::exp(x); }

template <class T>
MMKERN_INLINE T narrow(Accumulator<T> x) {
  return x;
}
template <>
MMKERN_INLINE at::BFloat16 narrow<at::BFloat16>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return std::bit_cast<at::BFloat16>(static_cast<uint16_t>(x == x ? rounded : 0x7fc0u));
}

// e^(s - reference) of a tile [count, rows] with leading dimension BLOCK: summed by row, and kept
// where there is room.
struct Exponentials {
  template <class T, int>
  static MMKERN_INLINE void run(const Accumulator<T>* s, int64_t count, int64_t rows,
                                const Accumulator<T>* reference, double* sums, T* kept,
                                int64_t ld) {
    for (int64_t i = 0; i < rows; i += LANES) {
      if (kept) {
        lanes<true, T>(s + i, count, reference + i, sums + i, kept + i, ld);
      } else {
        lanes<false, T>(s + i, count, reference + i, sums + i, nullptr, 0);
      }
    }
  }

  template <bool KEEP, class T>
  static MMKERN_INLINE void lanes(const Accumulator<T>* __restrict s, int64_t count,
                                  const Accumulator<T>* __restrict reference,
                                  double* __restrict sums, T* __restrict kept, int64_t ld) {
    Accumulator<T> part[LANES] = {};
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t k = 0; k < LANES; ++k) {
        const Accumulator<T> e = exponent(s[v * BLOCK + k] - reference[k]);
        part[k] += e;
        if constexpr (KEEP) kept[v * ld + k] = narrow<T>(e);
      }
    }
    for (int64_t k = 0; k < LANES; ++k) sums[k] += part[k];
  }
};

struct Largest {
  template <class A, int>
  static MMKERN_INLINE void run(const A* s, int64_t count, int64_t rows, A* __restrict top) {
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t i = 0; i < rows; ++i) {
        const A x = s[v * BLOCK + i];
        top[i] = x > top[i] ? x : top[i];
      }
    }
  }
};

// Σ_i P_iv factor_i
struct Weighted {
  template <class T, int>
  static MMKERN_INLINE void run(const T* __restrict p, int64_t ld, int64_t count, int64_t rows,
                                const Accumulator<T>* __restrict factor,
                                Accumulator<T>* __restrict out) {
    for (int64_t v = 0; v < count; ++v) {
      Accumulator<T> part[LANES] = {};
      for (int64_t i = 0; i < rows; i += LANES) {
        for (int64_t k = 0; k < LANES; ++k) {
          part[k] += static_cast<Accumulator<T>>(p[v * ld + i + k]) * factor[i + k];
        }
      }
      for (int64_t k = 0; k < LANES; ++k) out[v] += part[k];
    }
  }
};

// The labelled rows, and the vocabulary they meet.
template <class T>
class Problem {
 public:
  using A = Accumulator<T>;

  Problem(const char* op, const at::Tensor& hidden, const at::Tensor& weight,
          const at::Tensor& labels, const std::optional<at::Tensor>& bias, int64_t ignore_index)
      : width(hidden.size(1)), depth(round_up(width, PAIR<T>)), vocabulary(weight.size(0)),
        strips((vocabulary + VOCABULARY - 1) / VOCABULARY), workers(at::get_num_threads()),
        weight_(weight),
        direct_(weight.scalar_type() == c10::CppTypeToScalarType<T>::value && depth == width &&
                weight.stride(1) == 1 && weight.stride(0) >= width) {
    const at::Tensor all = labels.contiguous();
    const int64_t* y = all.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < all.size(0); ++i) {
      if (y[i] == ignore_index) continue;
      TORCH_CHECK_VALUE(y[i] >= 0 && y[i] < vocabulary, op, ": labels must be in [0, ", vocabulary,
                        ") or ignore_index (", ignore_index, "), got ", y[i], " at row ", i);
      by_label.emplace_back(y[i], index.size());
      index.push_back(i);
    }
    std::sort(by_label.begin(), by_label.end());
    rows = static_cast<int64_t>(index.size());
    padded = round_up(rows, LANES);
    blocks = (padded + BLOCK - 1) / BLOCK;
    if (rows == 0) return;
    const at::Tensor chosen = at::from_blob(index.data(), {rows}, at::kLong);
    values = at::index_select(hidden, 0, chosen).to(options());
    if (bias) bias_ = bias->to(options(true)).contiguous();
    right_ = at::zeros({blocks, depth, BLOCK}, options());
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const T* in = values.template const_data_ptr<T>() + b * BLOCK * width;
        T* out = right_.template mutable_data_ptr<T>() + b * BLOCK * depth;
        const int64_t count = std::min(BLOCK, rows - b * BLOCK);
        if constexpr (PAIR<T> == 1) {
          transpose(in, width, count, width, out, BLOCK);
        } else if (width % 2 == 0) {  // pairs of features are words
          transpose(reinterpret_cast<const float*>(in), width / 2, count, width / 2,
                    reinterpret_cast<float*>(out), BLOCK);
        } else {
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t d = 0; d < width; ++d) {
              out[(d / 2 * BLOCK + i) * 2 + d % 2] = in[i * width + d];
            }
          }
        }
      }
    });
  }

  at::TensorOptions options(bool accumulator = false) const {
    return at::TensorOptions().dtype(accumulator ? c10::CppTypeToScalarType<A>::value
                                                 : c10::CppTypeToScalarType<T>::value);
  }

  int64_t count(int64_t strip) const {
    return std::min(VOCABULARY, vocabulary - strip * VOCABULARY);
  }
  int64_t lanes(int64_t block) const { return std::min(BLOCK, padded - block * BLOCK); }

  // A strip of the weight and its leading dimension: where it lies, or as copied to `buffer`.
  std::pair<const T*, int64_t> strip(int64_t s, const T* buffer) const {
    if (!direct_) return {buffer, depth};
    return {weight_.const_data_ptr<T>() + s * VOCABULARY * weight_.stride(0), weight_.stride(0)};
  }

  std::pair<const T*, int64_t> load_strip(int64_t s, T* buffer) const {
    if (!direct_) {
      if (depth > width) std::fill(buffer, buffer + VOCABULARY * depth, T(0));
      at::from_blob(buffer, {count(s), width}, {depth, 1}, options())
          .copy_(weight_.narrow(0, s * VOCABULARY, count(s)));
    }
    return strip(s, buffer);
  }

  // Logits of a strip and a block, the labels' taken out: -inf there, f(row, logit) for each.
  template <class F>
  void logits(int64_t s, std::pair<const T*, int64_t> left, int64_t b, A* out, F label) const {
    product(count(s), lanes(b), depth, left.second, BLOCK, BLOCK, false, left.first,
            right_.template const_data_ptr<T>() + b * BLOCK * depth, out);
    if (bias_.defined()) {
      const A* add = bias_.template const_data_ptr<A>() + s * VOCABULARY;
      for (int64_t v = 0; v < count(s); ++v) {
        for (int64_t i = 0; i < lanes(b); ++i) out[v * BLOCK + i] += add[v];
      }
    }
    labels(s, [&](int64_t v, int64_t row) {
      if (row / BLOCK != b) return;
      A& x = out[v * BLOCK + row % BLOCK];
      label(row, x);
      x = -kInf<A>;
    });
  }

  // f(column in the strip, row) for the labels that lie in a strip.
  template <class F>
  void labels(int64_t s, F f) const {
    const std::pair<int64_t, int64_t> first{s * VOCABULARY, 0};
    auto it = std::lower_bound(by_label.begin(), by_label.end(), first);
    for (; it != by_label.end() && it->first < first.first + VOCABULARY; ++it) {
      f(it->first - first.first, it->second);
    }
  }

  // mean_j W_j
  std::vector<A> mean_weight(const at::Tensor& weight) const {
    constexpr int64_t PART = 4096;  // rows converted at a time
    at::Tensor sum = at::zeros({width}, options(true));
    for (int64_t v = 0; v < vocabulary; v += PART) {
      const at::Tensor part = weight.narrow(0, v, std::min(PART, vocabulary - v));
      sum += at::sum(part, 0, false, sum.scalar_type());
    }
    std::vector<A> mean(width);
    for (int64_t d = 0; d < width; ++d) mean[d] = sum.const_data_ptr<A>()[d] / vocabulary;
    return mean;
  }

  // mean_j S_ij of each row
  std::vector<A> means(const at::Tensor& weight) const {
    const std::vector<A> mean = mean_weight(weight);
    const A shift = bias_.defined() ? bias_.mean().template item<A>() : A(0);
    std::vector<A> out(rows);
    const T* h = values.template const_data_ptr<T>();
    for (int64_t i = 0; i < rows; ++i) {
      double sum = shift;
      for (int64_t d = 0; d < width; ++d) sum += static_cast<A>(h[i * width + d]) * mean[d];
      out[i] = static_cast<A>(sum);
    }
    return out;
  }

  const int64_t width, depth, vocabulary, strips, workers;
  int64_t rows = 0, padded = 0, blocks = 0;
  std::vector<int64_t> index;                           // of a labelled row in hidden
  std::vector<std::pair<int64_t, int64_t>> by_label;    // (label, labelled row), sorted
  at::Tensor values;                                    // [rows, width]

 private:
  const at::Tensor weight_;
  const bool direct_;
  at::Tensor bias_;   // [vocabulary]
  at::Tensor right_;  // [blocks][depth / PAIR][BLOCK][PAIR]
};

// What the forward leaves for the backward in a buffer of bytes: each row's reference, and Pᵀ of
// as many blocks as fit, strip after strip.
template <class T>
struct Kept {
  using A = Accumulator<T>;

  Kept(const Problem<T>& p, const at::Tensor& bytes) {
    const int64_t head = round_up(p.padded * sizeof(A), 64);
    const int64_t block = p.strips * VOCABULARY * BLOCK * sizeof(T);
    blocks = std::clamp<int64_t>((bytes.numel() - head) / block, 0, p.blocks);
    if (blocks == 0) return;
    ld = std::min(blocks * BLOCK, p.padded);
    auto* data = static_cast<char*>(bytes.data_ptr());
    reference = reinterpret_cast<A*>(data);
    tiles = reinterpret_cast<T*>(data + head);
  }

  T* strip(int64_t s) const { return tiles + s * VOCABULARY * ld; }

  int64_t blocks = 0, ld = 0;
  A* reference = nullptr;
  T* tiles = nullptr;
};

}  // namespace mmkern
