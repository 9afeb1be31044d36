// Attention on the CPU: mmkern/ops/attention/reference.py is the specification.
//
// A worker takes one head of one row of k and v at a time, with all samples that read it. The
// arithmetic is in attention_kernels.h, compiled here for every instruction set.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <tuple>
#include <type_traits>
#include <vector>

#include "simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmkern {
namespace {

constexpr double LOG2E = 1.4426950408889634;
constexpr int64_t TILE = 8;    // keys that are tested for a mask together
constexpr int64_t PART = 128;  // keys that are summed before they are added to a total

int64_t round_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// [B, H, L, E] with numbers side by side; strides in numbers.
struct Strided {
  void* data;
  int64_t b, h, l;
};

Strided strided(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

struct Item {
  int64_t row, h, b;  // b < 0: nobody reads the row
};

struct Problem {
  Strided q, k, v, out, grad, dq, dk, dv;
  void* lse;  // [B, H, Lq]
  int64_t batch, heads, queries, keys, width;
  const int32_t* intervals;  // [1 or B, Lq, 4] or null
  int64_t mask_batch;
  double scale;
  uint32_t threshold;  // of 65,536 draws, how many drop; 0 without dropout
  double rescale;      // what kept weights are multiplied by
  uint64_t seed;
  std::vector<Item> items;      // by row, head, sample
  std::vector<int64_t> groups;  // where the items of a (row, head) begin, and the end
};

// Keys [first, last) that some row sees; begin and end are even where keys go in pairs.
struct Segment {
  int64_t begin, end, first, last;
};

struct Band {
  int64_t first, last;   // of its segments
  int64_t low[2], high[2];  // keys that all of its rows see

  bool full(int64_t begin, int64_t end) const {
    return (low[0] <= begin && end <= high[0]) || (low[1] <= begin && end <= high[1]);
  }
};

// Which keys the bands of a sample see.
class Plan {
 public:
  std::vector<Band> bands;
  std::vector<Segment> seen;  // by any row

  Plan(const Problem& p, int64_t lanes, bool pairs) : p_(p), lanes_(lanes), pairs_(pairs) {}

  std::span<const Segment> of(const Band& band) const {
    return {segments_.data() + band.first, segments_.data() + band.last};
  }

  // True if the plan has changed.
  bool build(int64_t b) {
    b = p_.mask_batch > 1 ? b : 0;
    if (b == sample_) return false;
    sample_ = b;
    bands.clear(), segments_.clear(), seen.clear();
    bounds_.assign((p_.queries + lanes_ - 1) / lanes_ * lanes_ * 4, 0);
    for (int64_t first = 0; first < p_.queries; first += lanes_) {
      const int64_t rows = std::min(lanes_, p_.queries - first);
      Band band{int64_t(segments_.size()), 0, {0, 0}, {p_.keys, p_.keys}};
      union_.clear();
      for (int64_t i = first; i < first + rows; ++i) {
        int64_t bound[4];
        row(i, bound);
        for (int n = 0; n < 2; ++n) {
          band.low[n] = std::max(band.low[n], bound[2 * n]);
          band.high[n] = std::min(band.high[n], bound[2 * n + 1]);
          include(bound[2 * n], bound[2 * n + 1]);
        }
        for (int n = 0; n < 4; ++n) bounds_[first * 4 + n * lanes_ + i - first] = bound[n];
      }
      append(segments_);
      band.last = segments_.size();
      bands.push_back(band);
    }
    union_.clear();
    for (const Segment& s : segments_) include(s.first, s.last);
    append(seen);
    return true;
  }

  // The bounds of a band's rows, [4, lanes]; lanes without a row see nothing.
  const int32_t* bounds(int64_t band) const { return bounds_.data() + band * 4 * lanes_; }

 private:
  // (a0, a1, b0, b1) of a row within the keys, one interval where the two touch.
  void row(int64_t i, int64_t* bound) const {
    if (p_.intervals == nullptr) {
      bound[0] = 0, bound[1] = p_.keys, bound[2] = bound[3] = p_.keys;
      return;
    }
    const int32_t* from = p_.intervals + (sample_ * p_.queries + i) * 4;
    for (int n = 0; n < 4; ++n) bound[n] = std::clamp<int64_t>(from[n], 0, p_.keys);
    if (bound[0] >= bound[1]) bound[0] = bound[2], bound[1] = bound[3];
    if (bound[1] == bound[2]) bound[1] = std::max(bound[1], bound[3]), bound[2] = bound[3] = bound[1];
  }

  // Takes [first, last) into the ordered union.
  void include(int64_t first, int64_t last) {
    if (first >= last) return;
    auto at = union_.begin();
    while (at != union_.end() && at->last < first) ++at;
    if (at == union_.end() || at->first > last) {
      union_.insert(at, {0, 0, first, last});
      return;
    }
    at->first = std::min(at->first, first);
    at->last = std::max(at->last, last);
    auto after = at + 1;
    while (after != union_.end() && after->first <= at->last) {
      at->last = std::max(at->last, after->last);
      ++after;
    }
    union_.erase(at + 1, after);
  }

  void append(std::vector<Segment>& to) const {
    for (const Segment& s : union_) {
      const int64_t unit = pairs_ ? 2 : 1;
      to.push_back({s.first / unit * unit, round_to(s.last, unit), s.first, s.last});
    }
  }

  const Problem& p_;
  int64_t lanes_;
  bool pairs_;
  int64_t sample_ = -1;
  std::vector<Segment> segments_, union_;
  std::vector<int32_t> bounds_;
};

// Rows that this item will write and the next will read, fetched into cache a few at a time while
// this one computes: the rows of a head lie far apart, and no processor guesses them.
class Ahead {
 public:
  void clear() { count_ = 0, next_ = 0; }
  void add(const Strided& x, int64_t b, int64_t h, int64_t rows, int64_t width, int64_t size,
           bool write = false) {
    if (rows == 0) return;
    rows_[count_++] = {static_cast<const char*>(x.data) + (b * x.b + h * x.h) * size, x.l * size,
                       std::min<int64_t>(rows, 512), width * size, write};
  }
  void step() {
    for (int n = 0; n < 8 && next_ < count_; ++n) {
      Rows& r = rows_[next_];
      if (r.write) {
        for (int64_t byte = 0; byte < r.bytes; byte += 64) __builtin_prefetch(r.at + byte, 1);
      } else {
        for (int64_t byte = 0; byte < r.bytes; byte += 64) __builtin_prefetch(r.at + byte);
      }
      r.at += r.stride;
      if (--r.left == 0) ++next_;
    }
  }

 private:
  struct Rows {
    const char* at;
    int64_t stride, left, bytes;
    bool write;
  };
  Rows rows_[8];
  int count_ = 0, next_ = 0;
};

// A thread's buffers, 64-byte aligned. A pair of bf16 takes the room of a number.
template <class T>
struct Room {
  Ahead ahead;
  int64_t padded;      // head width in whole vectors
  T *qt, *gt;          // a band's q and grad transposed: [width, lanes]
  T *s, *d;            // a band's scores and their gradients: [keys, lanes]
  T* rows;             // a band's output or dq: [lanes, padded]
  T *kc, *vc;          // right operands [keys, padded]
  T *qc, *gc;          // the same of a band's rows [lanes, padded]
  T *dk, *dv;          // [keys, padded]
  T *pr, *dr;          // pairs: weights and dS as rows of bf16, [keys, lanes / 2]
  T* pp;               // weights or dS as pairs of keys, [keys / 2, lanes]

  Room(const Problem& p, int64_t lanes, int64_t vector, bool pairs, bool backward)
      : padded(round_to(p.width, vector)) {
    const int64_t keys = round_to(p.keys, 2), back = backward, pair = pairs;
    const std::pair<T**, int64_t> sizes[] = {
        {&qt, lanes * p.width},       {&gt, back * lanes * p.width},
        {&s, lanes * keys},           {&d, back * lanes * keys},
        {&rows, lanes * padded},      {&kc, keys * padded},
        {&vc, keys * padded},         {&qc, lanes * padded},
        {&gc, back * lanes * padded}, {&dk, back * keys * padded},
        {&dv, back * keys * padded},  {&pr, back * pair * lanes / 2 * keys},
        {&dr, back * pair * lanes / 2 * keys}, {&pp, pair * lanes * keys / 2}};
    constexpr int64_t line = 64 / sizeof(T);
    int64_t total = line;
    for (const auto& [to, count] : sizes) total += round_to(count, line);
    memory_ = at::empty({total * int64_t(sizeof(T))}, at::kByte);
    auto at = reinterpret_cast<uintptr_t>(memory_.data_ptr());
    at = round_to(at, 64);
    for (const auto& [to, count] : sizes) {
      *to = reinterpret_cast<T*>(at);
      at += round_to(count, line) * sizeof(T);
    }
  }

 private:
  at::Tensor memory_;
};

using Run = void (*)(const Problem&, int64_t begin, int64_t end);

}  // namespace
}  // namespace mmkern

#define VECTOR_ISA attention_base
#define VECTOR_TARGET
#define VECTOR_BYTES 16
#define ATTENTION_PAIRS 0
#if defined(__x86_64__)
#define ATTENTION_REGISTER "x"
#else
#define ATTENTION_REGISTER "w"
#endif
#include "attention_tiles.h"
#include "attention_kernels.h"
#undef VECTOR_ISA
#undef VECTOR_TARGET
#undef VECTOR_BYTES

#if defined(__x86_64__)
#define VECTOR_ISA attention_avx2
#define VECTOR_TARGET __attribute__((target("avx2,fma")))
#define VECTOR_BYTES 32
#include "attention_tiles.h"
#include "attention_kernels.h"
#undef VECTOR_ISA
#undef VECTOR_TARGET
#undef VECTOR_BYTES
#undef ATTENTION_PAIRS

#undef ATTENTION_REGISTER
#define ATTENTION_REGISTER "v"
#define VECTOR_ISA attention_avx512
#define VECTOR_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#define VECTOR_BYTES 64
#define ATTENTION_PAIRS 0
#include "attention_tiles.h"
#include "attention_kernels.h"
#undef VECTOR_ISA
#undef VECTOR_TARGET
#undef ATTENTION_PAIRS

#define VECTOR_ISA attention_pairs
#define VECTOR_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")))
#define ATTENTION_PAIRS 1
#include "attention_tiles.h"
#include "attention_kernels.h"
#endif

namespace mmkern {

namespace {

std::atomic<int> limit{3};

// Of base, avx2, avx512, avx512 with bf16.
int level() {
  int found = 0;
#if defined(__x86_64__)
  found = static_cast<int>(isa());
  if (found == 2 && __builtin_cpu_supports("avx512bf16")) found = 3;
#endif
  return std::min(found, limit.load());
}

template <class T>
Run select(int level, bool backward) {
#if defined(__x86_64__)
  if (level >= 2) {
    return backward ? attention_avx512::backward<T, false> : attention_avx512::forward<T, false>;
  }
  if (level == 1) {
    return backward ? attention_avx2::backward<T, false> : attention_avx2::forward<T, false>;
  }
#endif
  return backward ? attention_base::backward<T, false> : attention_base::forward<T, false>;
}

Run select(at::ScalarType dtype, bool backward) {
  if (dtype == at::kDouble) return select<double>(level(), backward);
#if defined(__x86_64__)
  if (dtype == at::kBFloat16) {
    return backward ? attention_pairs::backward<float, true> : attention_pairs::forward<float, true>;
  }
#endif
  return select<float>(level(), backward);
}

// What the kernels compute in: bf16 where the processor multiplies pairs of it and rows hold whole
// pairs, else fp32 (fp64 for fp64).
at::ScalarType computed(const at::Tensor& q, std::initializer_list<at::Tensor> inputs) {
  if (q.scalar_type() == at::kDouble) return at::kDouble;
  bool pairs = q.scalar_type() == at::kBFloat16 && level() == 3 && q.size(3) % 2 == 0;
  for (const at::Tensor& x : inputs) pairs = pairs && x.stride(2) % 2 == 0;
  return pairs ? at::kBFloat16 : at::kFloat;
}

// Asks for large pages for a result: a fresh buffer of 50 MB costs more in page faults, 4 KiB at a
// time, than in writing it. Memory that was in use before stays as it is.
at::Tensor large_pages(at::Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const auto from = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t begin = (from + page - 1) / page * page, end = (from + x.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return x;
}

// In the dtype of the computation, with a row's numbers side by side.
at::Tensor operand(const at::Tensor& x, at::ScalarType dtype) {
  const at::Tensor y = x.to(dtype);
  return y.stride(3) == 1 || y.size(3) == 1 ? y : y.contiguous();
}

void check(const at::Tensor& x, const char* name, const at::Tensor& like, int64_t batch,
           int64_t length) {
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == like.scalar_type() && x.dim() == 4 &&
                  x.size(0) == batch && x.size(1) == like.size(1) && x.size(2) == length &&
                  x.size(3) == like.size(3),
              "attention: ", name, " must be ", like.scalar_type(), " [", batch, ", ", like.size(1),
              ", ", length, ", ", like.size(3), "] on the CPU, got ", x.scalar_type(), " ",
              x.sizes());
}

// Everything but the tensors' memory.
Problem describe(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                 const std::optional<at::Tensor>& intervals,
                 const std::optional<at::Tensor>& kv_row, const std::optional<at::Tensor>& seed,
                 double dropout_p, double scale) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && at::isFloatingType(q.scalar_type()),
              "attention: q and k must be floating point [B, H, L, E]");
  check(q, "q", q, q.size(0), q.size(2));
  check(k, "k", q, kv_row ? k.size(0) : q.size(0), k.size(2));
  check(v, "v", q, k.size(0), k.size(2));
  Problem p{};
  p.batch = q.size(0), p.heads = q.size(1), p.queries = q.size(2);
  p.keys = k.size(2), p.width = q.size(3), p.scale = scale;
  if (intervals) {
    TORCH_CHECK(intervals->is_cpu() && intervals->scalar_type() == at::kInt &&
                    intervals->dim() == 3 && intervals->size(1) == p.queries &&
                    intervals->size(2) == 4 &&
                    (intervals->size(0) == 1 || intervals->size(0) == p.batch),
                "attention: intervals must be int32 [1 or ", p.batch, ", ", p.queries,
                ", 4] on the CPU, got ", intervals->scalar_type(), " ", intervals->sizes());
    p.intervals = intervals->const_data_ptr<int32_t>();
    p.mask_batch = intervals->size(0);
  }
  p.rescale = 1;
  if (seed) {
    p.threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536));
    p.rescale = p.threshold < 65536 ? 65536. / (65536 - p.threshold) : 0;
    p.seed = static_cast<uint64_t>(seed->item<int64_t>());
  }

  std::vector<std::vector<int64_t>> readers(k.size(0));
  const at::Tensor row = kv_row ? kv_row->to(at::kLong).contiguous() : at::Tensor();
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t from = kv_row ? row.const_data_ptr<int64_t>()[b] : b;
    TORCH_CHECK_INDEX(0 <= from && from < k.size(0), "attention: kv_row names row ", from,
                      " of k, which has ", k.size(0));
    readers[from].push_back(b);
  }
  p.items.reserve(std::max(p.batch, k.size(0)) * p.heads);
  for (int64_t from = 0; from < k.size(0); ++from) {
    if (readers[from].empty()) readers[from].push_back(-1);
    for (int64_t h = 0; h < p.heads; ++h) {
      p.groups.push_back(p.items.size());
      for (const int64_t b : readers[from]) p.items.push_back({from, h, b});
    }
  }
  p.groups.push_back(p.items.size());
  return p;
}

// Items or groups a task: about 10^5 products.
int64_t grain(const Problem& p) {
  return 1 + 100'000 / std::max<int64_t>(1, p.queries * p.keys * p.width);
}

std::tuple<at::Tensor, at::Tensor> attention_fwd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& intervals, const std::optional<at::Tensor>& kv_row,
    const std::optional<at::Tensor>& seed, double dropout_p, double scale) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto mask = intervals ? std::optional(intervals->contiguous()) : std::nullopt;
  Problem p = describe(q, k, v, mask, kv_row, seed, dropout_p, scale);
  const auto dtype = computed(q, {q, k, v}), wide = dtype == at::kDouble ? dtype : at::kFloat;
  const at::Tensor rows = operand(q, dtype), keys = operand(k, dtype), values = operand(v, dtype);
  at::Tensor out = at::empty({p.batch, p.queries, p.heads, p.width}, rows.options());
  out = large_pages(out).transpose(1, 2);
  at::Tensor lse = at::empty({p.batch, p.heads, p.queries}, q.options().dtype(wide));
  p.q = strided(rows), p.k = strided(keys), p.v = strided(values), p.out = strided(out);
  p.lse = lse.data_ptr();
  std::erase_if(p.items, [](const Item& item) { return item.b < 0; });
  const Run run = select(dtype, false);
  at::parallel_for(0, p.items.size(), grain(p),
                   [&](int64_t begin, int64_t end) { run(p, begin, end); });
  return {out.to(q.scalar_type()), lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_bwd(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& lse, const std::optional<at::Tensor>& intervals,
    const std::optional<at::Tensor>& kv_row, const std::optional<at::Tensor>& seed,
    double dropout_p, double scale) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto mask = intervals ? std::optional(intervals->contiguous()) : std::nullopt;
  Problem p = describe(q, k, v, mask, kv_row, seed, dropout_p, scale);
  check(grad, "grad", q, p.batch, p.queries);
  const auto dtype = computed(q, {q, k, v, grad}), wide = dtype == at::kDouble ? dtype : at::kFloat;
  TORCH_CHECK(lse.is_cpu() && lse.scalar_type() == wide && lse.is_contiguous() &&
                  lse.sizes() == at::IntArrayRef({p.batch, p.heads, p.queries}),
              "attention: lse must be the forward's, got ", lse.scalar_type(), " ", lse.sizes());
  const at::Tensor upstream = operand(grad, dtype), rows = operand(q, dtype),
                   keys = operand(k, dtype), values = operand(v, dtype);
  p.grad = strided(upstream), p.q = strided(rows), p.k = strided(keys), p.v = strided(values);
  p.lse = lse.data_ptr();
  at::Tensor results[3] = {at::empty_like(q), at::empty_like(k), at::empty_like(v)};
  at::Tensor written[3];
  Strided* to[3] = {&p.dq, &p.dk, &p.dv};
  for (int n = 0; n < 3; ++n) {
    const bool direct = results[n].scalar_type() == dtype &&
                        (results[n].stride(3) == 1 || p.width == 1);
    written[n] = direct ? results[n] : at::empty(results[n].sizes(), rows.options());
    *to[n] = strided(large_pages(written[n]));
  }
  const Run run = select(dtype, true);
  at::parallel_for(0, p.groups.size() - 1, grain(p),
                   [&](int64_t begin, int64_t end) { run(p, begin, end); });
  for (int n = 0; n < 3; ++n) {
    if (!written[n].is_same(results[n])) results[n].copy_(written[n]);
  }
  return {results[0], results[1], results[2]};
}

}  // namespace

void limit_attention(int level) { limit = level; }

TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("attention_fwd", &attention_fwd);
  m.impl("attention_bwd", &attention_bwd);
}

}  // namespace mmkern
