// Products of matrices that are small enough to lie in a worker's cache, one thread each, and the
// layouts that their right operands want.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace mmkern {

// What products of T are summed in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Rows that a right operand interleaves: bf16 has [K/2][N][2], others [K][N].
template <class T>
constexpr int64_t PAIR = sizeof(T) == 2 ? 2 : 1;

// C [M, N] = A [M, K] · B (+ C). K is a multiple of PAIR. For bf16 where use_brgemm() holds.
void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
             const c10::BFloat16* a, const c10::BFloat16* b, float* c);
void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
             const float* a, const float* b, float* c);
void product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
             const double* a, const double* b, double* c);

// out[j][i] = in[i][j]
template <class T>
void transpose(const T* in, int64_t in_ld, int64_t rows, int64_t columns, T* out, int64_t out_ld);

// Rows [count][width] as a right operand of `padded` rows, zeros past the last.
template <class T>
void interleave(const T* in, int64_t in_ld, int64_t count, int64_t padded, int64_t width, T* out);

}  // namespace mmkern
