#include "products.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "simd.h"
#include "tiles.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define MMKERN_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#endif

namespace mmkern {
namespace {

using at::BFloat16;

template <class T>
void by_blas(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
             const T* a, const T* b, T* c) {
  const auto view = [](const T* p, int64_t rows, int64_t columns, int64_t ld) {
    return at::from_blob(const_cast<T*>(p), {rows, columns}, {ld, 1},
                         c10::CppTypeToScalarType<T>::value);
  };
  at::Tensor out = view(c, m, n, ldc);
  at::cpu::addmm_out(out, out, view(a, m, k, lda), view(b, k, n, ldb), add, 1);
}

#if defined(__x86_64__)
// M rows of C by two vectors, whose lanes `first` and `second` select. Both operands are read where
// they lie: MKL packs them anew in every call, which in tiles costs a sixth of the time, and on AMD's
// processors it does without AVX-512.
template <int M>
MMKERN_AVX512 void two_vectors(int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                               const float* a, const float* b, float* c, __mmask16 first,
                               __mmask16 second) {
  __m512 sums[M][2];
#pragma GCC unroll 14
  for (int i = 0; i < M; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < k; ++p) {
    const __m512 low = _mm512_maskz_loadu_ps(first, b + p * ldb);
    const __m512 high = _mm512_maskz_loadu_ps(second, b + p * ldb + 16);
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
      const __m512 x = _mm512_set1_ps(a[i * lda + p]);
      sums[i][0] = _mm512_fmadd_ps(x, low, sums[i][0]);
      sums[i][1] = _mm512_fmadd_ps(x, high, sums[i][1]);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < M; ++i) {
    float* row = c + i * ldc;
    if (add) {
      sums[i][0] = _mm512_add_ps(sums[i][0], _mm512_maskz_loadu_ps(first, row));
      sums[i][1] = _mm512_add_ps(sums[i][1], _mm512_maskz_loadu_ps(second, row + 16));
    }
    _mm512_mask_storeu_ps(row, first, sums[i][0]);
    _mm512_mask_storeu_ps(row + 16, second, sums[i][1]);
  }
}

constexpr int64_t MOST = 14;     // rows whose sums, with what they are made of, fill 31 registers
constexpr int64_t SUMMED = 256;  // terms that are summed one by one; sums of those are summed

using TwoVectors = decltype(&two_vectors<1>);
template <int... M>
constexpr auto table(std::integer_sequence<int, M...>) {
  return std::array<TwoVectors, sizeof...(M)>{&two_vectors<M + 1>...};
}

void by_vectors(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                const float* a, const float* b, float* c) {
  static constexpr auto kernels = table(std::make_integer_sequence<int, MOST>());
  const int64_t parts = (m + MOST - 1) / MOST;
  const auto lanes = [](int64_t count) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
  };
  for (int64_t p = 0; p < k; p += SUMMED) {
    const int64_t depth = std::min(SUMMED, k - p);
    for (int64_t j = 0; j < n; j += 32) {
      for (int64_t part = 0; part < parts; ++part) {  // of nearly equal heights
        const int64_t i = m * part / parts, rows = m * (part + 1) / parts - i;
        kernels[rows - 1](depth, lda, ldb, ldc, add || p > 0, a + i * lda + p, b + p * ldb + j,
                          c + i * ldc + j, lanes(n - j), lanes(n - j - 16));
      }
    }
  }
}

// 16 vectors of 16 words, transposed in place.
MMKERN_AVX512 inline void transpose_words(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// A square of 16 words a side.
MMKERN_AVX512 inline void transpose_square(const float* in, int64_t in_ld, float* out,
                                           int64_t out_ld) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * in_ld);
  transpose_words(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * out_ld, r[i]);
}

// [32][16] to [16][32]: pairs of rows are words.
MMKERN_AVX512 inline void transpose_square(const BFloat16* in, int64_t in_ld, BFloat16* out,
                                           int64_t out_ld) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) {
    const auto* row = reinterpret_cast<const __m256i*>(in + 2 * i * in_ld);
    const auto* next = reinterpret_cast<const __m256i*>(in + (2 * i + 1) * in_ld);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(row));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(next));
    r[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  transpose_words(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * out_ld, r[i]);
}
#endif

// Two rows of 16-bit numbers as one of pairs.
struct Pairs {
  template <class T, int>
  static MMKERN_INLINE void run(const T* __restrict even, const T* __restrict odd, int64_t width,
                                uint32_t* __restrict out) {
    for (int64_t d = 0; d < width; ++d) out[d] = even[d] | static_cast<uint32_t>(odd[d]) << 16;
  }
};

}  // namespace

void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
             const BFloat16* a, const BFloat16* b, float* c) {
  tile_gemm(m, n, k, lda, ldb, ldc, add, a, b, c);
}

void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
             const float* a, const float* b, float* c) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return by_vectors(m, n, k, lda, ldb, ldc, add, a, b, c);
#endif
  by_blas(m, n, k, lda, ldb, ldc, add, a, b, c);
}

void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
             const double* a, const double* b, double* c) {
  by_blas(m, n, k, lda, ldb, ldc, add, a, b, c);
}

template <class T>
void transpose(const T* in, int64_t in_ld, int64_t rows, int64_t columns, T* out, int64_t out_ld) {
  int64_t whole = 0;  // rows that squares have done, over `across` columns
  int64_t across = 0;
#if defined(__x86_64__)
  if constexpr (sizeof(T) <= 4) {
    if (isa() == Isa::avx512) {
      constexpr int64_t HEIGHT = 64 / sizeof(T);
      whole = rows / HEIGHT * HEIGHT;
      across = columns / 16 * 16;
      for (int64_t j = 0; j < across; j += 16) {
        for (int64_t i = 0; i < whole; i += HEIGHT) {
          transpose_square(in + i * in_ld + j, in_ld, out + j * out_ld + i, out_ld);
        }
      }
    }
  }
#endif
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < across ? whole : 0; i < rows; ++i) out[j * out_ld + i] = in[i * in_ld + j];
  }
}

template <class T>
void interleave(const T* in, int64_t in_ld, int64_t count, int64_t padded, int64_t width, T* out) {
  if constexpr (PAIR<T> == 1) {
    for (int64_t i = 0; i < count; ++i) std::copy_n(in + i * in_ld, width, out + i * width);
  } else {
    const auto* words = reinterpret_cast<const uint16_t*>(in);
    const std::vector<uint16_t> none(width, 0);
    for (int64_t i = 0; i < round_up(count, 2); i += 2) {
      const uint16_t* even = words + i * in_ld;
      simd<Pairs, uint16_t>(even, i + 1 < count ? even + in_ld : none.data(), width,
                            reinterpret_cast<uint32_t*>(out + i * width));
    }
  }
  const int64_t done = round_up(count, PAIR<T>);
  std::fill(out + done * width, out + padded * width, T(0));
}

#define MMKERN_LAYOUTS(T)                                                             \
  template void transpose<T>(const T*, int64_t, int64_t, int64_t, T*, int64_t);       \
  template void interleave<T>(const T*, int64_t, int64_t, int64_t, int64_t, T*);
MMKERN_LAYOUTS(float)
MMKERN_LAYOUTS(double)
MMKERN_LAYOUTS(BFloat16)

}  // namespace mmkern
