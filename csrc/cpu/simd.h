// Vectors of any width, exp and log1p on them, and the choice of instruction set at run time.
//
// A kernel is a struct with `template <class T, int W> static void run(...)`, forced inline. simd()
// calls the instance compiled for the widest instruction set that this processor has, so one build
// serves every x86-64 machine; elsewhere W fills the 16-byte vectors that all targets have.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define MMKERN_INLINE inline __attribute__((always_inline))

namespace mmkern {

template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vector = typename VectorOf<T, W>::type;

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();

template <class T, int W>
MMKERN_INLINE Vector<T, W> load(const T* p) {
  Vector<T, W> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
MMKERN_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T, int W>
MMKERN_INLINE Vector<T, W> fill(T value) {
  return value - Vector<T, W>{};
}

// NaN in `a` gives `b`: a running maximum b passes over NaN, which the sums then carry.
template <class V>
MMKERN_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

template <class T, int W>
MMKERN_INLINE T largest(Vector<T, W> v) {
  T top = v[0];
  for (int k = 1; k < W; ++k) top = v[k] > top ? v[k] : top;
  return top;
}

template <class T, int W>
MMKERN_INLINE T total(Vector<T, W> v) {
  for (int half = W / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  return v[0];
}

// e^x within 8.1e-8 of itself. 0 below -87.33, where the result would be subnormal; inf from 88.37 on; NaN
// stays. x = n ln 2 + r: n by adding 1.5 * 2^23, which leaves n in the low bits; ln 2 in two parts;
// e^r by a polynomial of degree 7 (Cephes' coefficients); 2^n by writing the exponent.
template <int W>
MMKERN_INLINE Vector<float, W> exponential(Vector<float, W> x) {
  using F = Vector<float, W>;
  using I = Vector<int32_t, W>;
  const F shifted = x * 1.44269504f + 12582912.f;
  const F n = shifted - 12582912.f;
  const F r = x - n * 0.693359375f + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const F y = p * (F)(((I)shifted << 23) + 0x3f800000);
  const F high = x > 88.37f ? fill<float, W>(kInf<float>) : y;
  return x < -87.33f ? F{} : high;
}

template <int W>
MMKERN_INLINE Vector<double, W> exponential(Vector<double, W> x) {
  for (int k = 0; k < W; ++k) x[k] = std::exp(x[k]);
  return x;
}

// log(1 + u) for 0 <= u <= 1, within 1.7e-7 of itself: 2 atanh(u / (2 + u)) by its series.
template <int W>
MMKERN_INLINE Vector<float, W> log_one_plus(Vector<float, W> u) {
  const auto z = u / (u + 2.f);
  const auto q = z * z;
  auto p = q * (2.f / 15) + 2.f / 13;
  p = p * q + 2.f / 11;
  p = p * q + 2.f / 9;
  p = p * q + 2.f / 7;
  p = p * q + 2.f / 5;
  p = p * q + 2.f / 3;
  return p * q * z + z * 2.f;
}

template <int W>
MMKERN_INLINE Vector<double, W> log_one_plus(Vector<double, W> u) {
  for (int k = 0; k < W; ++k) u[k] = std::log1p(u[k]);
  return u;
}

enum class Isa { base, avx2, avx512 };

inline Isa isa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Isa::avx512;
    }
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return avx2 ? Isa::avx2 : Isa::base;
  }();
  return best;
#else
  return Isa::base;
#endif
}

#if defined(__x86_64__)
template <class Kernel, class T, class... Args>
__attribute__((target("avx2,fma"))) void run_avx2(Args... args) {
  Kernel::template run<T, 32 / sizeof(T)>(args...);
}

template <class Kernel, class T, class... Args>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void
run_avx512(Args... args) {
  Kernel::template run<T, 64 / sizeof(T)>(args...);
}
#endif

// Kernel::run<T, W>(args...) with the best W.
template <class Kernel, class T, class... Args>
void simd(Args... args) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return run_avx512<Kernel, T>(args...);
  if (isa() == Isa::avx2) return run_avx2<Kernel, T>(args...);
#endif
  Kernel::template run<T, 16 / sizeof(T)>(args...);
}

}  // namespace mmkern
