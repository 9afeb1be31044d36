// Vectors of one instruction set. A kernel file includes this inside its namespace, once for each
// set. Every function carries the set's target attribute: GCC splits vectors too wide for a
// function's target before it inlines, so wide code in a function without it would be narrow.
//
// No include guard. The includer defines VECTOR_ISA (its namespace), VECTOR_TARGET and
// VECTOR_BYTES, and undefines them, FN and CALL after its kernels.

#define FN inline __attribute__((always_inline)) VECTOR_TARGET
#define CALL __attribute__((noinline)) VECTOR_TARGET

template <class T>
constexpr int W = VECTOR_BYTES / sizeof(T);

// W<T> numbers of each width, V and I as wide as a register.
template <class T>
struct Of {
  typedef T V __attribute__((vector_size(VECTOR_BYTES)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Int;
  typedef Int I __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t S __attribute__((vector_size(4 * W<T>)));
  typedef uint32_t U __attribute__((vector_size(4 * W<T>)));
  typedef uint64_t L __attribute__((vector_size(8 * W<T>)));
  typedef uint16_t H __attribute__((vector_size(2 * W<T>)));
  typedef uint8_t B __attribute__((vector_size(W<T>)));
};
template <class T>
using V = typename Of<T>::V;
template <class T>
using I = typename Of<T>::I;
template <class T>
using U = typename Of<T>::U;

template <class T>
FN V<T> load(const T* p) {
  V<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class X, class T>
FN void store(T* p, X v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
FN V<T> fill(T x) {
  return x - V<T>{};
}
