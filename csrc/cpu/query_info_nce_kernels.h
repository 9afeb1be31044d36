// What query_info_nce.cpp does on vectors, included once for each instruction set.
//
// No include guard. The includer defines what vectors.h asks for.

namespace mmkern::VECTOR_ISA {

#include "vectors.h"

// NaN in `a` gives `b`: a running maximum b passes over NaN, which the sums then carry.
template <class X>
FN X larger(X a, X b) {
  return a > b ? a : b;
}
template <class T>
FN T largest(V<T> v) {
  T top = v[0];
  for (int k = 1; k < W<T>; ++k) top = v[k] > top ? v[k] : top;
  return top;
}
template <class T>
FN T total(V<T> v) {
  T sum = v[0];
  for (int k = 1; k < W<T>; ++k) sum += v[k];
  return sum;
}
template <class T>
FN V<T> finite_reference(V<T> maximum) {
  return maximum == -kInf<T> ? V<T>{} : maximum;
}

// As in simd.h.
FN V<float> exponential(V<float> x) {
  const V<float> shifted = x * 1.44269504f + 12582912.f;
  const V<float> n = shifted - 12582912.f;
  const V<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const V<float> y = p * (V<float>)(((I<float>)shifted << 23) + 0x3f800000);
  const V<float> high = x > 88.37f ? fill<float>(kInf<float>) : y;
  return x < -87.33f ? V<float>{} : high;
}
FN V<double> exponential(V<double> x) {
  for (int k = 0; k < W<double>; ++k) x[k] = std::exp(x[k]);
  return x;
}

// ln x for positive normal x, within 1e-7 of itself: x = 2^n m with m in [sqrt(1/2), sqrt(2)), and
// Cephes' polynomial for ln m.
FN V<float> logarithm(V<float> x) {
  const I<float> bits = (I<float>)x - 0x3f3504f3;
  const V<float> n = __builtin_convertvector(bits >> 23, V<float>);
  const V<float> f = (V<float>)((bits & 0x007fffff) + 0x3f3504f3) - 1.f;
  V<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const V<float> z = f * f;
  V<float> y = p * f * z - n * 2.12194440e-4f;
  y = y - z * 0.5f;
  return f + y + n * 0.693359375f;
}
FN V<double> logarithm(V<double> x) {
  for (int k = 0; k < W<double>; ++k) x[k] = std::log(x[k]);
  return x;
}

template <class T>
FN U<T> high_word(U<T> x, uint32_t factor) {
#if VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    const __m512i f = _mm512_set1_epi32(static_cast<int>(factor));
    const __m512i even = _mm512_mul_epu32((__m512i)x, f);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), f);
    return (U<T>)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  }
#elif VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    const __m256i f = _mm256_set1_epi32(static_cast<int>(factor));
    const __m256i even = _mm256_mul_epu32((__m256i)x, f);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), f);
    return (U<T>)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }
#endif
  using L = typename Of<T>::L;
  return __builtin_convertvector((__builtin_convertvector(x, L) * factor) >> 32, U<T>);
}

// ln E with E = -ln(1 - v), v = (word + 1/2) 2^-32: of Philox2x32-10 at the counter (i, j), word
// `Word` of the two. The specification: reference.py.
template <class T, int Word>
FN V<T> noise(U<T> i, U<T> j, uint32_t key) {
  for (int round = 0; round < 10; ++round) {
    const U<T> high = high_word<T>(i, 0xD256D193u), low = i * 0xD256D193u;
    i = high ^ j ^ key;
    j = low;
    key += 0x9E3779B9u;
  }
  const V<T> word = __builtin_convertvector(Word ? j : i, V<T>);
  const T most = 1 - T(0x1p-24);
  V<T> v = (word + T(0.5)) * T(0x1p-32);
  v = v > most ? fill<T>(most) : v;
  // ln(1 - v) would lose a small v's digits; u and ln u err alike, and their ratio does not.
  const V<T> u = 1 - v;
  const V<T> e = u == 1 ? v : v * logarithm(u) / (u - 1);
  return logarithm(e);
}

template <class T>
FN U<T> count_from(int64_t first) {
  U<T> j;
  for (int k = 0; k < W<T>; ++k) j[k] = static_cast<uint32_t>(first + k);
  return j;
}

// Of G vectors of columns: the maximum over rows and the first row that attains it; NaN stays.
template <class T, int G>
FN void best_of(const T* s, int64_t ld, int64_t rows, V<T>* top, I<T>* index) {
  V<T> most[G];
  I<T> where[G];
  for (int g = 0; g < G; ++g) {
    most[g] = load(s + g * W<T>);
    where[g] = I<T>{};
  }
  for (int64_t q = 1; q < rows; ++q) {
    for (int g = 0; g < G; ++g) {
      const V<T> x = load(s + q * ld + g * W<T>);
      const I<T> taken = ~(x <= most[g]) & (most[g] == most[g]);
      most[g] = taken ? x : most[g];
      where[g] = taken ? I<T>{} + static_cast<typename Of<T>::Int>(q) : where[g];
    }
  }
  for (int g = 0; g < G; ++g) {
    top[g] = most[g];
    index[g] = where[g];
  }
}

// dots[j] = max_q s[q, j] and best[j] that q, for `count` columns. `s` is readable up to a multiple
// of 16 columns.
template <class T>
CALL void reduce(const T* s, int64_t ld, int64_t queries, int64_t count, T* dots, uint8_t* best) {
  constexpr int G = 4;
  for (int64_t j = 0; j < count; j += G * W<T>) {
    const int vectors = static_cast<int>(std::min<int64_t>(G, (count - j + W<T> - 1) / W<T>));
    V<T> top[G];
    I<T> index[G];
    if (vectors == G) {
      best_of<T, G>(s + j, ld, queries, top, index);
    } else {
      for (int g = 0; g < vectors; ++g) {
        best_of<T, 1>(s + j + g * W<T>, ld, queries, top + g, index + g);
      }
    }
    for (int g = 0; g < vectors; ++g) {
      const int64_t first = j + g * W<T>, left = std::min<int64_t>(W<T>, count - first);
      const auto bytes = __builtin_convertvector(index[g], typename Of<T>::B);
      std::memcpy(dots + first, &top[g], left * sizeof(T));
      std::memcpy(best + first, &bytes, left);
    }
  }
}

// One image's statistics; x gets its logits with positives and what is past the end at -inf.
template <class T>
CALL void row_statistics(const T* dots, int64_t count, T scale, Span positives, T* x, T* stats,
                         int64_t stride, const Draw* draw, int64_t image, T* key, int64_t* drawn) {
  const int64_t whole = count / W<T> * W<T>, padded = round_up(count, LANES);
  V<T> sums{};
  for (int64_t j = 0; j < whole; j += W<T>) {
    const V<T> logits = load(dots + j) * scale;
    sums += logits;
    store(x + j, logits);
  }
  T every = total<T>(sums);
  for (int64_t j = whole; j < count; ++j) every += x[j] = dots[j] * scale;
  std::fill(x + count, x + padded, -kInf<T>);
  Positives<T> found;
  for (const int64_t j : positives) {
    found.add(x[j]);
    x[j] = -kInf<T>;
  }
  V<T> top = fill<T>(-kInf<T>);
  for (int64_t j = 0; j < padded; j += W<T>) top = larger(load(x + j), top);
  const T m = largest<T>(top);
  const V<T> reference = finite_reference<T>(fill<T>(m));
  sums = V<T>{};
  for (int64_t j = 0; j < padded; j += W<T>) sums += exponential(load(x + j) - reference);
  const T values[] = {m, total<T>(sums), found.top, found.sum, found.total, found.number, every};
  for (int field = 0; field < FIELDS; ++field) stats[field * stride] = values[field];
  if (draw == nullptr) return;

  V<T> least = fill<T>(kInf<T>);
  I<T> where{};
  const U<T> i = U<T>{} + static_cast<uint32_t>(draw->offset + image);
  for (int64_t j = 0; j < padded; j += W<T>) {
    const V<T> keys = noise<T, 0>(i, count_from<T>(j), draw->key) - load(x + j);
    const auto nearer = keys < least;
    least = nearer ? keys : least;
    where = nearer ? I<T>{} + static_cast<typename Of<T>::Int>(j) : where;
  }
  *key = kInf<T>;
  *drawn = -1;
  for (int k = 0; k < W<T>; ++k) {
    if (least[k] < *key || (least[k] == *key && *drawn >= 0 && where[k] + k < *drawn)) {
      *key = least[k];
      *drawn = where[k] + k;
    }
  }
}

// Takes `rows` images' logits x (positives at -inf) into the statistics of columns [begin, end),
// both multiples of 16.
template <class T>
CALL void column_statistics(const T* x, int64_t ld, int64_t rows, int64_t begin, int64_t end,
                            const Columns<T>& c, const Draw* draw, int64_t image) {
  for (int64_t j = begin; j < end; j += W<T>) {
    const V<T> before = load(c.field(0) + j);
    V<T> top = before;
    for (int64_t i = 0; i < rows; ++i) top = larger(load(x + i * ld + j), top);
    const V<T> reference = finite_reference<T>(top);
    V<T> sum = load(c.field(1) + j) * exponential(before - reference);
    V<T> every = load(c.field(6) + j);
    for (int64_t i = 0; i < rows; ++i) {
      const V<T> logits = load(x + i * ld + j);
      sum += exponential(logits - reference);
      every += logits == -kInf<T> ? V<T>{} : logits;  // positives' are added by their own
    }
    store(c.field(0) + j, top);
    store(c.field(1) + j, sum);
    store(c.field(6) + j, every);
    if (draw == nullptr) continue;
    V<T> least = load(c.keys + j);
    I<T> where;
    std::memcpy(&where, c.drawn + j, sizeof where);
    for (int64_t i = 0; i < rows; ++i) {
      const U<T> row = U<T>{} + static_cast<uint32_t>(draw->offset + image + i);
      const V<T> keys = noise<T, 1>(row, count_from<T>(j), draw->key) - load(x + i * ld + j);
      const auto nearer = keys < least;
      least = nearer ? keys : least;
      where = nearer ? I<T>{} + static_cast<typename Of<T>::Int>(image + i) : where;
    }
    store(c.keys + j, least);
    store(c.drawn + j, where);
  }
}

// One image's weights, times w.factor: `row` for the queries' gradient and, unless null, `column`
// for the texts'. All are padded to 16, `dots` with zeros; x is scratch. Returns Σ (R + C) dots.
template <class T>
CALL T weights(const T* dots, int64_t count, Span positives, const Direction<T>& r,
               const Directions<T>& c, const Weighting<T>& w, T* x, T* row, T* column) {
  const int64_t padded = round_up(count, LANES);
  for (int64_t j = 0; j < padded; j += W<T>) store(x + j, load(dots + j) * w.scale);
  std::fill(x + count, x + padded, -kInf<T>);
  for (const int64_t j : positives) x[j] = -kInf<T>;
  V<T> sums{};
  for (int64_t j = 0; j < padded; j += W<T>) {
    const V<T> logits = load(x + j);
    const V<T> a = exponential(logits - r.top) * r.inverse - w.spread;
    const V<T> b = exponential(logits - load(c.top + j)) * load(c.inverse + j) - w.spread;
    // Positives come below: taking the spread back from a sum would leave its rounding.
    sums += logits == -kInf<T> ? V<T>{} : (a + b) * load(dots + j);
    store(row + j, (column ? a : a + b) * w.factor);
    if (column) store(column + j, b * w.factor);
  }
  T sum = total<T>(sums);
  for (const int64_t j : positives) {
    const T logit = dots[j] * w.scale;
    const T a = r.of_positive(logit, w), b = c.at(j).of_positive(logit, w);
    sum += (a + b) * dots[j];
    row[j] = (column ? a : a + b) * w.factor;
    if (column) column[j] = b * w.factor;
  }
  return sum;
}

// W features in T; X may be bf16's bits.
template <class T, class X>
FN V<T> load_wide(const X* p) {
  if constexpr (std::is_same_v<X, uint16_t>) {
    typename Of<T>::H bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return (V<T>)(__builtin_convertvector(bits, U<T>) << 16);
  } else {
    return load(p);
  }
}

// out (+)= Σ_k weight[k] x[index[k]], `width` (a multiple of 16) wide.
template <class T, class X>
FN void gather_sum(T* out, const T* weight, const int32_t* index, int64_t n, const X* x, int64_t ld,
                   int64_t width, bool add) {
  constexpr int G = 8;
  int64_t d = 0;
  for (; d + G * W<T> <= width; d += G * W<T>) {
    V<T> sums[G];
    for (int g = 0; g < G; ++g) sums[g] = add ? load(out + d + g * W<T>) : V<T>{};
    for (int64_t k = 0; k < n; ++k) {
      const X* row = x + index[k] * ld + d;
      for (int g = 0; g < G; ++g) sums[g] += weight[k] * load_wide<T>(row + g * W<T>);
    }
    for (int g = 0; g < G; ++g) store(out + d + g * W<T>, sums[g]);
  }
  for (; d < width; d += W<T>) {
    V<T> sum = add ? load(out + d) : V<T>{};
    for (int64_t k = 0; k < n; ++k) sum += weight[k] * load_wide<T>(x + index[k] * ld + d);
    store(out + d, sum);
  }
}

// out[q] (+)= Σ over the columns whose best query is q; at most CHUNK columns, sorted here.
template <class T, class X>
CALL void query_gradient(const T* weight, const uint8_t* best, int64_t columns, const X* text,
                         int64_t width, int64_t queries, bool add, T* out) {
  int32_t starts[257] = {}, index[CHUNK];
  T sorted[CHUNK];
  for (int64_t j = 0; j < columns; ++j) ++starts[best[j] + 1];
  for (int64_t q = 0; q < queries; ++q) starts[q + 1] += starts[q];
  for (int64_t j = 0; j < columns; ++j) {
    const int32_t place = starts[best[j]]++;
    index[place] = static_cast<int32_t>(j);
    sorted[place] = weight[j];
  }
  for (int64_t q = 0, begin = 0; q < queries; begin = starts[q++]) {
    gather_sum(out + q * width, sorted + begin, index + begin, starts[q] - begin, text, width,
               width, add);
  }
}

// out[j] += Σ_i weight[i, j] queries[i, best[i, j]] for the columns [begin, end) of a band.
template <class T, class X>
CALL void text_gradient(const T* weight, int64_t weight_ld, const uint8_t* best, int64_t best_ld,
                        int64_t images, int64_t begin, int64_t end, const X* queries, int64_t count,
                        int64_t ld, int64_t width, T* out) {
  int32_t index[ROWS];
  T column[ROWS];
  for (int64_t j = begin; j < end; ++j) {
    for (int64_t i = 0; i < images; ++i) {
      index[i] = static_cast<int32_t>(i * count + best[i * best_ld + j]);
      column[i] = weight[i * weight_ld + j];
    }
    gather_sum(out + j * width, column, index, images, queries, ld, width, true);
  }
}

template <class T, class X>
constexpr Kernels<T, X> kernels{&reduce<T>,  &row_statistics<T>,    &column_statistics<T>,
                                &weights<T>, &query_gradient<T, X>, &text_gradient<T, X>};

}  // namespace mmkern::VECTOR_ISA

#undef FN
#undef CALL
#undef VECTOR_ISA
#undef VECTOR_TARGET
#undef VECTOR_BYTES
