// Types of query_info_nce.cpp and its kernels, and its sizes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <type_traits>

#include "simd.h"

namespace mmkern {
namespace {

constexpr int FIELDS = 7;       // statistics of a row or column, in the specification's order
constexpr int64_t ROWS = 512;   // queries in a band, unless one image has more
constexpr int64_t TILE = 2048;  // texts in a tile of at::mm
constexpr int64_t PIECE = 64;   // columns of the smallest share of a worker
constexpr int64_t CHUNK = 256;  // texts that a worker's cache holds beside its gradients

using Span = std::span<const int64_t>;

// The positives of a row or column, one by one.
template <class T>
struct Positives {
  T top = -kInf<T>, sum = 0, total = 0, number = 0;
  void add(T logit) {
    if (logit > top) {
      sum *= std::exp(top - logit);  // 0 for the first
      top = logit;
    }
    sum += std::exp(logit - (top == -kInf<T> ? 0 : top));
    total += logit;
    number += 1;
  }
};

// Statistics of all columns while images come in: [FIELDS, ld], and the draws' least keys.
template <class T>
struct Columns {
  T* stats;
  int64_t ld;
  T* keys;
  std::conditional_t<sizeof(T) == 4, int32_t, int64_t>* drawn;
  T* field(int index) const { return stats + index * ld; }
};

struct Draw {
  uint32_t key;
  int64_t offset;
};

template <class T>
struct Weighting {
  T scale, kept, spread;  // kept: 1 - ε; spread: ε / M
  T constant, factor;     // of the scale's gradient, and of the others
};

// Softmax of one row or column in the backward: exp(S - top) · inverse. See _weights of the
// specification.
template <class T>
struct Direction {
  T top, inverse, top_positive, inverse_positives, miss, number;

  Direction(const T* stats, int64_t stride) {
    const T top_negative = stats[0], negatives = stats[stride];
    top_positive = stats[2 * stride];
    inverse_positives = 1 / stats[3 * stride];
    number = stats[5 * stride];
    top = std::max(top_negative, top_positive);
    const T missed = negatives * std::exp(top_negative - top);
    const T all = missed + stats[3 * stride] * std::exp(top_positive - top);
    inverse = 1 / all;
    miss = missed / all;
  }

  T of_positive(T logit, const Weighting<T>& w) const {
    const T e = std::exp(logit - top_positive) * inverse_positives;
    return (e - (w.kept / number + w.spread)) - e * miss;
  }
};

template <class T>
struct Directions {
  const T *top, *inverse;  // padded with zeros
  const Direction<T>* all;
  const Direction<T>& at(int64_t j) const { return all[j]; }
};

// One instruction set's kernels: sums in T; gradients read features in X, which is T or bf16's bits.
template <class T, class X>
struct Kernels {
  void (*reduce)(const T*, int64_t, int64_t, int64_t, T*, uint8_t*);
  void (*row_statistics)(const T*, int64_t, T, Span, T*, T*, int64_t, const Draw*, int64_t, T*,
                         int64_t*);
  void (*column_statistics)(const T*, int64_t, int64_t, int64_t, int64_t, const Columns<T>&,
                            const Draw*, int64_t);
  T (*weights)(const T*, int64_t, Span, const Direction<T>&, const Directions<T>&,
               const Weighting<T>&, T*, T*, T*);
  void (*query_gradient)(const T*, const uint8_t*, int64_t, const X*, int64_t, int64_t, bool, T*);
  void (*text_gradient)(const T*, int64_t, const uint8_t*, int64_t, int64_t, int64_t, int64_t,
                        const X*, int64_t, int64_t, int64_t, T*);
};

}  // namespace
}  // namespace mmkern
