// Attention of one head on vectors, included by attention.cpp behind attention_tiles.h, once for
// each instruction set.
//
// Scores are kept transposed, [keys, LANES]: a vector holds W query rows' scores of one key. Sums
// over keys need no shuffles then, intervals are four vectors, and keys are skipped one by one. A
// band is LANES query rows; its scores exist whole, in a buffer of the thread.

namespace mmkern::VECTOR_ISA {

// A tensor's rows for one head as operands of a product.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

template <class E>
FN E* head(const Strided& x, int64_t b, int64_t h) {
  return static_cast<E*>(x.data) + b * x.b + h * x.h;
}

// Rows as they are if they fill whole vectors, else a copy that does.
template <class T>
FN Rows<T> whole(const T* from, int64_t stride, int64_t rows, int64_t width, int64_t padded,
                 T* copy) {
  if (width == padded) return {from, stride};
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    for (int64_t e = 0; e < padded; ++e) copy[r * padded + e] = e < width ? from[e] : 0;
  }
  return {copy, padded};
}

// One head of one sample, as a worker goes through its items.
template <class T, bool PAIRS>
struct Head {
  using E = typename Operand<T, PAIRS>::Element;
  static constexpr int64_t L = LANES<T>;
  static constexpr int w = W<T>;
  static constexpr T INF = std::numeric_limits<T>::infinity();
  using Product = typename Operand<T, PAIRS>::Product;

  const Problem& p;
  Room<T>& m;
  const Plan& plan;
  int64_t b, h;
  int64_t filled;        // keys whose dk and dv hold sums
  Rows<T> k, v;          // [keys, width], left operands
  Rows<T> kr, vr;        // [keys, padded] or pairs of rows [keys/2, padded], right operands
  const Band* band;
  int64_t first, rows;   // of the band
  const int32_t* bounds;  // [4, L]
  uint32_t k0[L], k1[L];  // dropout's words

  FN int64_t steps() const { return PAIRS ? p.width / 2 : p.width; }
  FN int64_t vectors() const { return m.padded / w; }

  // Keys that nobody sees count as zeros in a right operand: a pair may hold one.
  FN void keys_operand(const Strided& x, int64_t row, T* room, bool want_right, Rows<T>& left,
                       Rows<T>& right) {
    const E* from = head<E>(x, row, h);
    if constexpr (PAIRS) {
      left = {reinterpret_cast<const T*>(from), x.l / 2};
      if (!want_right) return;
      right = {room, m.padded};
      for (const Segment& seen : plan.seen) {
        for (int64_t j = seen.begin; j < seen.end; j += 2) {
          interleave(j < seen.first ? nullptr : from + j * x.l,
                     j + 1 < seen.last ? from + (j + 1) * x.l : nullptr, p.width, m.padded,
                     room + j / 2 * m.padded);
        }
      }
    } else {
      left = right = whole(from, x.l, p.keys, p.width, m.padded, room);
    }
  }

  // A band's rows, transposed and (for a backward) as a right operand.
  template <bool RIGHT>
  FN Rows<T> band_operand(const Strided& x, T* transposed, T* room) {
    const E* from = head<E>(x, b, h) + first * x.l;
    if constexpr (PAIRS) {
      transpose(reinterpret_cast<const T*>(from), x.l / 2, rows, p.width / 2, transposed);
      for (int64_t i = 0; RIGHT && i < rows; i += 2) {
        interleave(from + i * x.l, i + 1 < rows ? from + (i + 1) * x.l : nullptr, p.width,
                   m.padded, room + i / 2 * m.padded);
      }
      return {room, m.padded};
    } else {
      const Rows<T> all = whole(from, x.l, rows, p.width, m.padded, room);
      transpose(all.data, all.stride, rows, p.width, transposed);
      return all;
    }
  }

  FN I<T> bound(int which, int n) const {
    typename Of<T>::S x;
    __builtin_memcpy(&x, bounds + which * L + n * w, sizeof x);
    return __builtin_convertvector(x, I<T>);
  }
  FN I<T> allowed(int n, int64_t key) const {
    const I<T> j = I<T>{} + typename Of<T>::Int(key);
    return ((bound(0, n) <= j) & (j < bound(1, n))) | ((bound(2, n) <= j) & (j < bound(3, n)));
  }

  // Forward: a band's scores become weights e^(x - top), less those that dropout takes.
  template <int N, bool DROP>
  FN void softmax(V<T>* top, V<T>* sum) {
    const T scale = p.scale;
    for (int n = 0; n < N; ++n) top[n] = fill(-INF), sum[n] = V<T>{};
    T* s = m.s;
    for (const Segment& seg : plan.of(*band)) {
      for (int64_t j = seg.begin; j < seg.end;) {
        const int64_t stop = std::min(j + TILE, seg.end);
        const bool full = band->full(j, stop);
        for (; j < stop; ++j, s += L) {
          for (int n = 0; n < N; ++n) {
            V<T> x = scaled(load(s + n * w), scale);
            if (!full) x = allowed(n, j) ? x : fill(-INF);
            store(s + n * w, x);
            top[n] = x > top[n] ? x : top[n];
          }
        }
      }
    }
    V<T> reference[N];
    for (int n = 0; n < N; ++n) reference[n] = top[n] == -INF ? V<T>{} : top[n];
    s = m.s;
    T* pairs = m.pp;
    U<T> words[N] = {};
    for (const Segment& seg : plan.of(*band)) {
      V<T> part[N] = {};
      for (int64_t j = seg.begin; j < seg.end;) {
        V<T> e[2][N];
        for (int r = 0; r < (PAIRS ? 2 : 1); ++r, ++j, s += L) {
          for (int n = 0; n < N; ++n) {
            e[r][n] = exponential<T>(load(s + n * w), reference[n]);
            part[n] += e[r][n];
            if (DROP) {
              if (!(j & 1) || j == seg.begin) words[n] = word<T>(k0 + n * w, k1 + n * w, j);
              e[r][n] = kept<T>(words[n], j, p.threshold) ? e[r][n] : V<T>{};
            }
            if (!PAIRS) store(s + n * w, e[r][n]);
          }
        }
        if constexpr (PAIRS) {
          for (int n = 0; n < N; ++n) store(pairs + n * w, paired<T>(e[0][n], e[1][n]));
          pairs += L;
        }
        if ((j - seg.begin) % PART == 0 || j == seg.end) {
          for (int n = 0; n < N; ++n) sum[n] += part[n], part[n] = V<T>{};
        }
      }
    }
  }

  // [rows, padded] = Σ over the band's keys of weights (by column) · right operand.
  FN void sum_over_keys(const T* weights, const Rows<T>& right) {
    bool add = false;
    constexpr int64_t unit = PAIRS ? 2 : 1;
    for (const Segment& seg : plan.of(*band)) {
      for (int64_t j = seg.begin; j < seg.end; j += PART) {
        const int64_t depth = std::min(PART, seg.end - j) / unit;
        const T* from = right.data + j / unit * right.stride;
        if (add) {
          width_product<Product, true, true>(m.ahead, vectors(), rows, depth, weights, L, from,
                                             right.stride, m.rows, m.padded);
        } else {
          width_product<Product, true, false>(m.ahead, vectors(), rows, depth, weights, L, from,
                                              right.stride, m.rows, m.padded);
        }
        add = true;
        weights += depth * L;
      }
    }
    if (!add) std::memset(m.rows, 0, rows * m.padded * sizeof(T));
  }

  // to[keys, padded] += weights (by row) · right operand of the band's rows. Keys from `filled` on
  // hold nothing yet.
  FN void sum_over_rows(const T* weights, const Rows<T>& right, T* to) {
    constexpr int64_t stride = PAIRS ? L / 2 : L;
    const int64_t depth = PAIRS ? (rows + 1) / 2 : rows;
    int64_t end = filled;
    for (const Segment& seg : plan.of(*band)) {
      const int64_t old = std::clamp(end, seg.first, seg.last);
      const T* from = weights + (seg.first - seg.begin) * stride;
      width_product<Product, false, true>(m.ahead, vectors(), old - seg.first, depth, from, stride,
                                          right.data, right.stride, to + seg.first * m.padded,
                                          m.padded);
      clear(to, end, seg.first);
      width_product<Product, false, false>(m.ahead, vectors(), seg.last - old, depth,
                                           from + (old - seg.first) * stride, stride, right.data,
                                           right.stride, to + old * m.padded, m.padded);
      end = std::max(end, seg.last);
      weights += (seg.end - seg.begin) * stride;
    }
  }
  FN void clear(T* to, int64_t begin, int64_t end) {
    if (begin < end) std::memset(to + begin * m.padded, 0, (end - begin) * m.padded * sizeof(T));
  }

  // Products of the band's keys with qᵀ or gradᵀ. A pair's key past the last is left as it is: no
  // mask allows it.
  template <int N>
  FN void score(const Rows<T>& left, const T* transposed, T* to) {
    for (const Segment& seg : plan.of(*band)) {
      const int64_t end = std::min(seg.end, p.keys);
      score_product<Product, N>(m.ahead, end - seg.begin, steps(), left.data + seg.begin * left.stride,
                                left.stride, transposed, to);
      to += (seg.end - seg.begin) * L;
    }
  }

  template <int N>
  FN void forward_band() {
    band_operand<false>(p.q, m.qt, m.qc);
    score<N>(k, m.qt, m.s);
    V<T> top[N], sum[N];
    if (p.threshold) {
      softmax<N, true>(top, sum);
    } else {
      softmax<N, false>(top, sum);
    }
    sum_over_keys(PAIRS ? m.pp : m.s, vr);
    T lses[L], sums[L];
    for (int n = 0; n < N; ++n) {
      store(sums + n * w, sum[n]);
      store(lses + n * w, top[n] + logarithm<T>(sum[n]));
    }
    T* lse = static_cast<T*>(p.lse) + (b * p.heads + h) * p.queries + first;
    E* out = head<E>(p.out, b, h) + first * p.out.l;
    for (int64_t i = 0; i < rows; ++i) {
      const bool empty = sums[i] == 0;
      lse[i] = empty ? -INF : lses[i];
      finish<T, E>(m.rows + i * m.padded, empty ? T(0) : T(p.rescale) / sums[i], out + i * p.out.l,
                   p.width);
    }
  }

  // Backward: scores become weights P, and grad · vᵀ becomes P dP, summed to delta, then dS. In
  // between the sign of a weight says whether dropout kept it.
  template <int N, bool DROP>
  FN void weights_and_gradients() {
    const T scale = p.scale;
    T lse[L] = {};
    const T* from = static_cast<const T*>(p.lse) + (b * p.heads + h) * p.queries + first;
    for (int64_t i = 0; i < rows; ++i) lse[i] = from[i];
    V<T> reference[N], delta[N];
    for (int n = 0; n < N; ++n) reference[n] = load(lse + n * w), delta[n] = V<T>{};
    U<T> words[N] = {};
    T *s = m.s, *d = m.d;
    for (const Segment& seg : plan.of(*band)) {
      V<T> part[N] = {};
      for (int64_t j = seg.begin; j < seg.end;) {
        const int64_t stop = std::min(j + TILE, seg.end);
        const bool full = band->full(j, stop);
        for (; j < stop; ++j, s += L, d += L) {
          for (int n = 0; n < N; ++n) {
            V<T> x = exponential<T>(scaled(load(s + n * w), scale), reference[n]);
            V<T> g = load(d + n * w);
            I<T> keep{};
            if (DROP) {
              if (!(j & 1) || j == seg.begin) words[n] = word<T>(k0 + n * w, k1 + n * w, j);
              keep = kept<T>(words[n], j, p.threshold);
              g = keep ? g * T(p.rescale) : V<T>{};
            }
            V<T> product = x * g;
            if (!full) {
              const I<T> may = allowed(n, j);
              x = may ? x : V<T>{};
              product = may ? product : V<T>{};
            }
            part[n] += product;
            store(s + n * w, DROP ? (keep ? x : -x) : x);
            store(d + n * w, product);
          }
        }
        if ((j - seg.begin) % PART == 0 || j == seg.end) {
          for (int n = 0; n < N; ++n) delta[n] += part[n], part[n] = V<T>{};
        }
      }
    }
    s = m.s, d = m.d;
    T *weights = m.pr, *gradients = m.dr, *pairs = m.pp;
    for (const Segment& seg : plan.of(*band)) {
      for (int64_t j = seg.begin; j < seg.end;) {
        V<T> x[2][2] = {}, g[2][2] = {};
        for (int r = 0; r < (PAIRS ? 2 : 1); ++r, ++j, s += L, d += L) {
          for (int n = 0; n < N; ++n) {
            const V<T> weight = load(s + n * w);
            const V<T> whole = DROP ? (weight < 0 ? -weight : weight) : weight;
            x[r][n] = DROP ? (weight < 0 ? V<T>{} : weight) : weight;
            g[r][n] = load(d + n * w) - whole * delta[n];
            if (!PAIRS && DROP) store(s + n * w, x[r][n]);
            if (!PAIRS) store(d + n * w, g[r][n]);
          }
        }
        if constexpr (PAIRS) {
          for (int r = 0; r < 2; ++r, weights += L / 2, gradients += L / 2) {
            store(weights, rounded<T>(x[r][0], x[r][1]));
            store(gradients, rounded<T>(g[r][0], g[r][1]));
          }
          for (int n = 0; n < N; ++n) store(pairs + n * w, paired<T>(g[0][n], g[1][n]));
          pairs += L;
        }
      }
    }
  }

  template <int N>
  FN void backward_band() {
    const Rows<T> q = band_operand<true>(p.q, m.qt, m.qc);
    const Rows<T> grad = band_operand<true>(p.grad, m.gt, m.gc);
    score<N>(k, m.qt, m.s);
    score<N>(v, m.gt, m.d);
    if (p.threshold) {
      weights_and_gradients<N, true>();
    } else {
      weights_and_gradients<N, false>();
    }
    sum_over_rows(PAIRS ? m.pr : m.s, grad, m.dv);
    sum_over_rows(PAIRS ? m.dr : m.d, q, m.dk);
    for (const Segment& seg : plan.of(*band)) filled = std::max(filled, seg.last);
    sum_over_keys(PAIRS ? m.pp : m.d, kr);
    E* dq = head<E>(p.dq, b, h) + first * p.dq.l;
    for (int64_t i = 0; i < rows; ++i) {
      finish<T, E>(m.rows + i * m.padded, T(p.scale), dq + i * p.dq.l, p.width);
    }
  }

  template <bool BACKWARD>
  FN void bands() {
    for (int64_t t = 0; t < int64_t(plan.bands.size()); ++t) {
      band = &plan.bands[t], first = t * L, rows = std::min(L, p.queries - first);
      bounds = plan.bounds(t);
      if (p.threshold) row_words<T>(p, b, h, first, k0, k1);
      if constexpr (BACKWARD) {
        rows <= w ? backward_band<1>() : backward_band<2>();
      } else {
        rows <= w ? forward_band<1>() : forward_band<2>();
      }
    }
  }
};

// Items of the groups begin to end: the samples that read one head of one row of k and v.
template <class T, bool PAIRS>
CALL void forward(const Problem& p, int64_t begin, int64_t end) {
  using E = typename Operand<T, PAIRS>::Element;
  Room<T> room(p, LANES<T>, W<T>, PAIRS, false);
  Plan plan(p, LANES<T>, PAIRS);
  Head<T, PAIRS> head{p, room, plan};
  int64_t row = -1, h = -1;
  for (int64_t n = begin; n < end; ++n) {
    const Item& item = p.items[n];
    const bool planned = plan.build(item.b);
    head.b = item.b, head.h = item.h;
    room.ahead.clear();
    room.ahead.add(p.out, item.b, item.h, p.queries, p.width, sizeof(E), true);
    if (n + 1 < end) {
      const Item& next = p.items[n + 1];
      room.ahead.add(p.q, next.b, next.h, p.queries, p.width, sizeof(E));
      if (next.row != item.row || next.h != item.h) {
        room.ahead.add(p.k, next.row, next.h, p.keys, p.width, sizeof(E));
        room.ahead.add(p.v, next.row, next.h, p.keys, p.width, sizeof(E));
      }
    }
    if (row != item.row || h != item.h || (PAIRS && planned)) {
      head.keys_operand(p.k, item.row, room.kc, false, head.k, head.kr);
      head.keys_operand(p.v, item.row, room.vc, true, head.v, head.vr);
    }
    row = item.row, h = item.h;
    head.template bands<false>();
  }
}

template <class T, bool PAIRS>
CALL void backward(const Problem& p, int64_t begin, int64_t end) {
  using E = typename Operand<T, PAIRS>::Element;
  Room<T> room(p, LANES<T>, W<T>, PAIRS, true);
  Plan plan(p, LANES<T>, PAIRS);
  Head<T, PAIRS> work{p, room, plan};
  for (int64_t group = begin; group < end; ++group) {
    const Item& front = p.items[p.groups[group]];
    work.filled = 0;
    for (int64_t n = p.groups[group]; n < p.groups[group + 1]; ++n) {
      const Item& item = p.items[n];
      if (item.b < 0) continue;  // nobody reads this row
      const bool planned = plan.build(item.b);
      work.b = item.b, work.h = item.h;
      room.ahead.clear();
      room.ahead.add(p.dq, item.b, item.h, p.queries, p.width, sizeof(E), true);
      if (n + 1 == p.groups[group + 1]) {
        room.ahead.add(p.dk, item.row, item.h, p.keys, p.width, sizeof(E), true);
        room.ahead.add(p.dv, item.row, item.h, p.keys, p.width, sizeof(E), true);
      }
      if (n + 1 < p.groups[end] && p.items[n + 1].b >= 0) {
        const Item& next = p.items[n + 1];
        room.ahead.add(p.q, next.b, next.h, p.queries, p.width, sizeof(E));
        room.ahead.add(p.grad, next.b, next.h, p.queries, p.width, sizeof(E));
        if (next.row != item.row || next.h != item.h) {
          room.ahead.add(p.k, next.row, next.h, p.keys, p.width, sizeof(E));
          room.ahead.add(p.v, next.row, next.h, p.keys, p.width, sizeof(E));
        }
      }
      if (&item == &front || (PAIRS && planned)) {
        work.keys_operand(p.k, item.row, room.kc, true, work.k, work.kr);
        work.keys_operand(p.v, item.row, room.vc, false, work.v, work.vr);
      }
      work.template bands<true>();
    }
    work.clear(room.dk, work.filled, p.keys);
    work.clear(room.dv, work.filled, p.keys);
    E* dk = head<E>(p.dk, front.row, front.h);
    E* dv = head<E>(p.dv, front.row, front.h);
    for (int64_t j = 0; j < p.keys; ++j) {
      finish<T, E>(room.dk + j * room.padded, T(p.scale), dk + j * p.dk.l, p.width);
      finish<T, E>(room.dv + j * room.padded, T(p.rescale), dv + j * p.dv.l, p.width);
    }
  }
}

}  // namespace mmkern::VECTOR_ISA

#undef FN
#undef CALL
