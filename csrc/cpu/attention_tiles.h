// Products and transposes of attention, included by attention.cpp once for each instruction set.
//
// No include guard. The includer defines what vectors.h asks for, ATTENTION_PAIRS (1 for
// avx512_bf16) and ATTENTION_REGISTER (the constraint of a vector in assembly).

namespace mmkern::VECTOR_ISA {

#include "vectors.h"

template <class T>
constexpr int LANES = 2 * W<T>;

// e^(x - reference), 1 if they are equal; 0 where it would be subnormal. NaN stays.
template <class T>
FN V<T> exponential(V<T> x, V<T> reference) {
  x -= reference;
  if constexpr (sizeof(T) == 8) {
    for (int k = 0; k < W<T>; ++k) x[k] = std::exp(x[k]);
    return x;
  } else {
    // 2^n · 2^r, n + r = x log2(e), |r| <= 1/2.
#if VECTOR_BYTES == 64
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-150.f), (__m512)x);
    const __m512 n = _mm512_roundscale_ps((__m512)((V<T>)y * float(LOG2E)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const V<T> r = (V<T>)y * float(LOG2E) - (V<T>)n;
#else
    V<T> y = x < -150.f ? fill<T>(-150) : x;
    y = y > 150.f ? fill<T>(150) : y;
    const V<T> shifted = y * float(LOG2E) + 12582912.f;  // 1.5 · 2^23: n in the low bits
    const V<T> r = y * float(LOG2E) - (shifted - 12582912.f);
#endif
    V<T> p = r * 1.535336067e-4f + 1.339887446e-3f;  // minimax, within 2e-9
    p = p * r + 9.618437363e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.f;
#if VECTOR_BYTES == 64
    return (V<T>)_mm512_scalef_ps((__m512)p, n);
#else
    const I<T> n = (I<T>)shifted - 0x4b400000;
    V<T> z = p * (V<T>)((n + 127) << 23);
    z = n > 127 ? fill<T>(std::numeric_limits<T>::infinity()) : z;
    z = n < -126 ? V<T>{} : z;
    return x == x ? z : x;
#endif
  }
}

// ln x for normal x > 0 within 2 units in the last place; NaN stays.
template <class T>
FN V<T> logarithm(V<T> x) {
  if constexpr (sizeof(T) == 8) {
    for (int k = 0; k < W<T>; ++k) x[k] = std::log(x[k]);
    return x;
  } else {
    // x = 2^n m, 3/4 <= m < 3/2; ln m = 2 atanh(z), z = (m - 1) / (m + 1).
    const I<T> n = ((I<T>)x - 0x3f400000) >> 23;
    const V<T> mantissa = (V<T>)((I<T>)x - (n << 23));
    const V<T> z = (mantissa - 1.f) / (mantissa + 1.f), q = z * z;
    V<T> p = q * (2.f / 9) + 2.f / 7;
    p = p * q + 2.f / 5;
    p = p * q + 2.f / 3;
    const V<T> y = p * q * z + z * 2.f + __builtin_convertvector(n, V<T>) * 0.69314718f;
    return x == x ? y : x;
  }
}

// A product that no compiler fuses into a sum: forward and backward must round scores alike.
template <class T>
FN V<T> scaled(V<T> score, T scale) {
  V<T> x = score * scale;
  __asm__("" : "+" ATTENTION_REGISTER (x));
  return x;
}

// What a product multiplies: numbers, or pairs of bf16 in 32 bits.
template <class S>
struct Numbers {
  using T = S;
  using A = S;
  static FN V<T> step(V<T> sum, A a, V<T> b) { return sum + a * b; }
};
template <class S, bool PAIRS>
struct Operand {
  using Product = Numbers<S>;
  using Element = S;
};
#if ATTENTION_PAIRS
struct Pairs {
  using T = float;
  using A = float;  // the bits of a pair
  static FN V<T> step(V<T> sum, A a, V<T> b) {
    return (V<T>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
  }
};
template <>
struct Operand<float, true> {
  using Product = Pairs;
  using Element = c10::BFloat16;
};
#endif

// C [R, N vectors] = Σ_k a(m, k) · B[k] (+ C, added last: sums in parts round less). a(m, k) is
// a[m as + k], or a[m + k as] BY_COLUMN.
template <class P, bool BY_COLUMN, bool ADD, int R, int N>
FN void tile(int64_t depth, const typename P::A* a, int64_t as, const typename P::A* b, int64_t bs,
             typename P::T* c, int64_t cs) {
  using T = typename P::T;
  V<T> sum[R][N];
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = V<T>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    V<T> row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = load(b + k * bs + n * W<T>);
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) {
      const T x = BY_COLUMN ? a[m + k * as] : a[m * as + k];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] = P::step(sum[m][n], x, row[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      T* to = c + m * cs + n * W<T>;
      store(to, ADD ? load(to) + sum[m][n] : sum[m][n]);
    }
  }
}

// The same for any number of rows, R at a time.
template <class P, bool BY_COLUMN, bool ADD, int R, int N>
CALL void panel(Ahead& ahead, int64_t rows, int64_t depth, const typename P::A* a, int64_t as,
                const typename P::A* b, int64_t bs, typename P::T* c, int64_t cs) {
  const int64_t step = BY_COLUMN ? 1 : as;
  for (; rows >= R; rows -= R, a += R * step, c += R * cs) {
    tile<P, BY_COLUMN, ADD, R, N>(depth, a, as, b, bs, c, cs);
    ahead.step();
  }
  if constexpr (R > 1) {
    if (rows >= R / 2) {
      constexpr int HALF = R / 2;
      tile<P, BY_COLUMN, ADD, HALF, N>(depth, a, as, b, bs, c, cs);
      rows -= HALF, a += HALF * step, c += HALF * cs;
    }
    for (; rows > 0; --rows, a += step, c += cs) {
      tile<P, BY_COLUMN, ADD, 1, N>(depth, a, as, b, bs, c, cs);
    }
  }
}

// Scores [keys, LANES], of which N vectors hold rows.
template <class P, int N>
FN void score_product(Ahead& ahead, int64_t keys, int64_t depth, const typename P::A* a, int64_t as,
                      const typename P::A* b, typename P::T* c) {
  constexpr int64_t L = LANES<typename P::T>;
  panel<P, false, false, VECTOR_BYTES == 64 ? 8 : 4, N>(ahead, keys, depth, a, as, b, L, c, L);
}

// Products [rows, width], `vectors` wide.
template <class P, bool BY_COLUMN, bool ADD>
FN void width_product(Ahead& ahead, int64_t vectors, int64_t rows, int64_t depth, const typename P::A* a,
                      int64_t as, const typename P::A* b, int64_t bs, typename P::T* c,
                      int64_t cs) {
  constexpr int64_t w = W<typename P::T>;
#if VECTOR_BYTES == 64
  for (; vectors >= 4; vectors -= 4, b += 4 * w, c += 4 * w) {
    panel<P, BY_COLUMN, ADD, 4, 4>(ahead, rows, depth, a, as, b, bs, c, cs);
  }
  if (vectors == 3) return panel<P, BY_COLUMN, ADD, 4, 3>(ahead, rows, depth, a, as, b, bs, c, cs);
#else
  for (; vectors >= 2; vectors -= 2, b += 2 * w, c += 2 * w) {
    panel<P, BY_COLUMN, ADD, 4, 2>(ahead, rows, depth, a, as, b, bs, c, cs);
  }
#endif
  if (vectors == 2) return panel<P, BY_COLUMN, ADD, 4, 2>(ahead, rows, depth, a, as, b, bs, c, cs);
  if (vectors == 1) panel<P, BY_COLUMN, ADD, 4, 1>(ahead, rows, depth, a, as, b, bs, c, cs);
}

// to[e][i] = from[i][e] for i < rows, 0 for other lanes; e < depth.
template <class T>
FN void transpose(const T* from, int64_t stride, int64_t rows, int64_t depth, T* to) {
  constexpr int w = W<T>;
  for (int64_t i0 = 0; i0 < LANES<T>; i0 += w) {
    int64_t e0 = 0;
    for (; e0 + w <= depth && i0 < rows; e0 += w) {
      V<T> x[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i) {
        x[i] = i0 + i < rows ? load(from + (i0 + i) * stride + e0) : V<T>{};
      }
#pragma GCC unroll 4
      for (int half = w / 2; half > 0; half /= 2) {
        I<T> low, high;
#pragma GCC unroll 16
        for (int k = 0; k < w; ++k) {
          low[k] = k & half ? k - half + w : k;
          high[k] = k & half ? k + w : k + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i) {
          if (i & half) continue;
          const V<T> a = x[i], b = x[i + half];
          x[i] = __builtin_shuffle(a, b, low);
          x[i + half] = __builtin_shuffle(a, b, high);
        }
      }
#pragma GCC unroll 16
      for (int e = 0; e < w; ++e) store(to + (e0 + e) * LANES<T> + i0, x[e]);
    }
    for (; e0 < depth; ++e0) {
      for (int64_t i = i0; i < i0 + w; ++i) {
        to[e0 * LANES<T> + i] = i < rows ? from[i * stride + e0] : T(0);
      }
    }
  }
}

#if ATTENTION_PAIRS
// Rows 2r and 2r + 1 of bf16 as one row of pairs; a missing row (null) counts as zeros.
FN void interleave(const c10::BFloat16* even, const c10::BFloat16* odd, int64_t width,
                   int64_t padded, float* to) {
  int64_t e = 0;
  for (; e + 16 <= width; e += 16) {
    __m512i pair = _mm512_setzero_si512();
    if (even) pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + e)));
    if (odd) {
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(odd + e)));
      pair = _mm512_or_si512(pair, _mm512_slli_epi32(high, 16));
    }
    store(to + e, pair);
  }
  for (; e < padded; ++e) {
    const uint32_t low = even && e < width ? even[e].x : 0;
    const uint32_t high = odd && e < width ? odd[e].x : 0;
    const uint32_t pair = low | high << 16;
    __builtin_memcpy(to + e, &pair, 4);
  }
}

// A vector as half a one of bf16, and two vectors as one.
template <class T>
FN __m256i halved(V<T> x) {
  return (__m256i)_mm512_cvtneps_pbh((__m512)x);
}
template <class T>
FN V<T> rounded(V<T> low, V<T> high) {
  return (V<T>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Lane by lane the pair (even, odd) as bf16.
template <class T>
FN V<T> paired(V<T> even, V<T> odd) {
  typedef uint16_t H __attribute__((vector_size(64)));
  const H zip = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (V<T>)_mm512_permutexvar_epi16((__m512i)zip, (__m512i)rounded<T>(even, odd));
}
#endif

// A row of a result, scaled.
template <class T, class E>
FN void finish(const T* from, T factor, E* to, int64_t count) {
  int64_t e = 0;
  for (; e + W<T> <= count; e += W<T>) {
    const V<T> x = load(from + e) * factor;
    if constexpr (std::is_same_v<T, E>) {
      store(to + e, x);
    } else {
      store(to + e, halved<T>(x));
    }
  }
  for (; e < count; ++e) to[e] = static_cast<E>(from[e] * factor);
}

// Dropout's two words for each row of a band.
template <class T>
FN void row_words(const Problem& p, int64_t b, int64_t h, int64_t row, uint32_t* k0, uint32_t* k1) {
  constexpr int n = VECTOR_BYTES / 8;
  typedef uint64_t Q __attribute__((vector_size(VECTOR_BYTES)));
  for (int lane = 0; lane < LANES<T>; lane += n) {
    Q c0, c1 = Q{} + uint64_t(h), c2 = Q{} + uint64_t(b), c3{};
    for (int k = 0; k < n; ++k) c0[k] = uint32_t(row + lane + k);
    uint64_t key0 = p.seed & 0xffffffff, key1 = p.seed >> 32;
    for (int round = 0; round < 10; ++round) {
      const Q p0 = c0 * 0xD2511F53, p1 = c2 * 0xCD9E8D57;
      c0 = (p1 >> 32) ^ c1 ^ key0;
      c2 = (p0 >> 32) ^ c3 ^ key1;
      c1 = p1 & 0xffffffff;
      c3 = p0 & 0xffffffff;
      key0 = (key0 + 0x9E3779B9) & 0xffffffff;
      key1 = (key1 + 0xBB67AE85) & 0xffffffff;
    }
    for (int k = 0; k < n && lane + k < LANES<T>; ++k) k0[lane + k] = c0[k], k1[lane + k] = c1[k];
  }
}
template <class T>
FN U<T> word(const uint32_t* k0, const uint32_t* k1, int64_t key) {
  U<T> x, y;
  __builtin_memcpy(&x, k0, sizeof x);
  __builtin_memcpy(&y, k1, sizeof y);
  x ^= uint32_t(key >> 1) * 0x9E3779B9u;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = ((x ^ (x >> 15)) + y) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
// All bits set in the lanes that are kept.
template <class T>
FN I<T> kept(U<T> word, int64_t key, uint32_t threshold) {
  const U<T> draw = key & 1 ? word : word << 16;
  return __builtin_convertvector((typename Of<T>::S)(draw >= (threshold << 16)), I<T>);
}

}  // namespace mmkern::VECTOR_ISA
