// A linear layer with adapters on visual rows, on the CPU: mmkern/ops/plora_linear/reference.py is
// the specification.
//
// The products are the platform's, on views: visual rows lie in runs as long as an image, so the
// adapter reads x and adds to y where they are. Runs too short for a matrix product are copied
// together; so is the input that dropout has changed, a piece at a time.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "simd.h"

namespace mmkern {
namespace {

constexpr int64_t SHORT = 64;    // rows; shorter runs are copied together
constexpr int64_t PIECE = 1024;  // most rows that are copied at once

// Features of one call of Philox: 8 groups, each GROUP wide.
constexpr int64_t GROUP = 32;
constexpr int64_t PERIOD = 8 * GROUP;

// Philox4x32-10 of (row, feature group's place) and the draws' comparison: see the specification.
// Writes one row of features, E being an integer of their size, with zeros where they are dropped.
template <class E>
struct Drop {
  template <class T, int W>
  static MMKERN_INLINE void run(const E* in, E* out, int64_t features, uint32_t row,
                                uint32_t key_low, uint32_t key_high, uint32_t threshold) {
    using U = Vector<uint32_t, W>;
    alignas(64) uint32_t keep[PERIOD];
    for (int64_t base = 0; base < features; base += PERIOD) {
      for (int64_t j = 0; j < GROUP; j += W) {
        U c0 = U{} + row, c1, c2{}, c3{};
        for (int i = 0; i < W; ++i) c1[i] = static_cast<uint32_t>(base / 8 + j + i);
        uint32_t k0 = key_low, k1 = key_high;
        for (int round = 0; round < 10; ++round) {
          const U high0 = high<W>(c0, 0xD2511F53u), high1 = high<W>(c2, 0xCD9E8D57u);
          const U low0 = c0 * 0xD2511F53u, low1 = c2 * 0xCD9E8D57u;
          c0 = high1 ^ c1 ^ k0;
          c2 = high0 ^ c3 ^ k1;
          c1 = low1;
          c3 = low0;
          k0 += 0x9E3779B9u;
          k1 += 0xBB67AE85u;
        }
        const U words[] = {c0, c1, c2, c3};
        for (int w = 0; w < 4; ++w) {
          store(keep + 2 * w * GROUP + j, (U)((words[w] & 0xffffu) >= threshold));
          store(keep + (2 * w + 1) * GROUP + j, (U)((words[w] >> 16) >= threshold));
        }
      }
      const int64_t count = std::min(PERIOD, features - base);
      for (int64_t k = 0; k < count; ++k) out[base + k] = keep[k] ? in[base + k] : E(0);
    }
  }

  template <int W>
  static MMKERN_INLINE Vector<uint32_t, W> high(Vector<uint32_t, W> a, uint32_t b) {
    using L = Vector<uint64_t, W>;
    return __builtin_convertvector((__builtin_convertvector(a, L) * b) >> 32,
                                   Vector<uint32_t, W>);
  }
};

struct Dropout {
  uint32_t threshold = 0, key_low = 0, key_high = 0;

  Dropout(int64_t threshold, const std::optional<at::Tensor>& seed) {
    if (!seed) return;
    const auto key = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    this->threshold = static_cast<uint32_t>(threshold);
    key_low = static_cast<uint32_t>(key);
    key_high = static_cast<uint32_t>(key >> 32);
  }

  void row(const char* in, char* out, int64_t features, int64_t size, int64_t row) const {
    const auto drop = [&](auto element) {
      using E = decltype(element);
      simd<Drop<E>, float>(reinterpret_cast<const E*>(in), reinterpret_cast<E*>(out), features,
                           static_cast<uint32_t>(row), key_low, key_high, threshold);
    };
    if (size == 2) return drop(uint16_t());
    if (size == 4) return drop(uint32_t());
    drop(uint64_t());
  }
};

// Rows of the batch that are worked on together. Without `rows` they are first, first + 1, ...
struct Piece {
  int64_t place, count, first;
  const int32_t* rows;
  int64_t row(int64_t i) const { return rows ? rows[i] : first + i; }
};

// The visual rows in an order of their own: long runs, then the rows of all short ones.
class Visual {
 public:
  Visual(const at::Tensor& rows, int64_t total, Dropout dropout) : dropout_(dropout) {
    const int32_t* r = rows.const_data_ptr<int32_t>();
    const int64_t count = rows.size(0);
    const int64_t most = dropout_.threshold ? PIECE : count;
    int64_t place = 0;
    for (int64_t i = 0, end; i < count; i = end) {
      TORCH_CHECK(r[i] > (i ? r[i - 1] : -1) && r[i] < total,
                  "plora_linear: visual rows must ascend within [0, ", total, "), got ", r[i]);
      for (end = i + 1; end < count && r[end] == r[end - 1] + 1;) ++end;
      TORCH_CHECK(r[end - 1] < total, "plora_linear: visual row ", r[end - 1], " of ", total);
      if (end - i < SHORT) {
        scattered_.insert(scattered_.end(), r + i, r + end);
        continue;
      }
      for (int64_t k = i; k < end; k += most) {
        pieces_.push_back({place, std::min(most, end - k), r[k], nullptr});
        place += pieces_.back().count;
      }
    }
    const int64_t rest = scattered_.size();
    for (int64_t k = 0; k < rest; k += PIECE) {
      pieces_.push_back({place, std::min(PIECE, rest - k), 0, scattered_.data() + k});
      place += pieces_.back().count;
    }
  }

  const std::vector<Piece>& pieces() const { return pieces_; }

  // The piece's rows of `matrix`: a view, or a copy where they lie apart.
  at::Tensor take(const at::Tensor& matrix, const Piece& piece) const {
    return piece.rows ? copy(matrix, piece, false) : matrix.narrow(0, piece.first, piece.count);
  }

  at::Tensor take_dropped(const at::Tensor& matrix, const Piece& piece) const {
    return dropout_.threshold ? copy(matrix, piece, true) : take(matrix, piece);
  }

  // matrix[rows] += scale · left · right, in place.
  void add_product(const at::Tensor& matrix, const Piece& piece, const at::Tensor& left,
                   const at::Tensor& right, double scale) const {
    at::Tensor own = take(matrix, piece);
    at::cpu::addmm_out(own, own, left, right, 1, scale);
    if (piece.rows) put(matrix, piece, own);
  }

  // The same with what dropout leaves of the product.
  void add_dropped_product(const at::Tensor& matrix, const Piece& piece, const at::Tensor& left,
                           const at::Tensor& right) const {
    if (!dropout_.threshold) return add_product(matrix, piece, left, right, 1);
    at::Tensor product = at::cpu::mm(left, right);
    const int64_t size = product.element_size(), width = product.size(1);
    char* p = static_cast<char*>(product.mutable_data_ptr());
    at::parallel_for(0, piece.count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        char* row = p + i * width * size;
        dropout_.row(row, row, width, size, piece.row(i));
      }
    });
    at::Tensor own = take(matrix, piece);
    own.add_(product);
    if (piece.rows) put(matrix, piece, own);
  }

 private:
  at::Tensor copy(const at::Tensor& matrix, const Piece& piece, bool dropped) const {
    const int64_t size = matrix.element_size(), width = matrix.size(1);
    at::Tensor out = at::empty({piece.count, width}, matrix.options());
    const char* from = static_cast<const char*>(matrix.const_data_ptr());
    char* to = static_cast<char*>(out.mutable_data_ptr());
    at::parallel_for(0, piece.count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const char* in = from + piece.row(i) * matrix.stride(0) * size;
        char* row = to + i * width * size;
        if (dropped) {
          dropout_.row(in, row, width, size, piece.row(i));
        } else {
          std::memcpy(row, in, width * size);
        }
      }
    });
    return out;
  }

  void put(const at::Tensor& matrix, const Piece& piece, const at::Tensor& values) const {
    const int64_t bytes = matrix.size(1) * matrix.element_size();
    char* to = static_cast<char*>(matrix.mutable_data_ptr());
    const char* from = static_cast<const char*>(values.const_data_ptr());
    at::parallel_for(0, piece.count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(to + piece.row(i) * bytes, from + i * bytes, bytes);
      }
    });
  }

  Dropout dropout_;
  std::vector<Piece> pieces_;
  std::vector<int32_t> scattered_;
};

// scale · Σ_pieces left · right. With several pieces, 16-bit products are summed in fp32.
class Sum {
 public:
  Sum(int64_t rows, int64_t columns, const at::Tensor& like, size_t pieces, double scale)
      : scale_(scale), wide_(pieces > 1 && like.element_size() < 4) {
    total_ = at::empty({rows, columns}, wide_ ? like.options().dtype(at::kFloat) : like.options());
    type_ = like.scalar_type();
    if (pieces == 0) total_.zero_();
  }

  void add(const at::Tensor& left, const at::Tensor& right) {
    if (wide_) {
      const at::Tensor product = at::cpu::mm(left, right);
      first_ ? total_.copy_(product) : total_.add_(product);
    } else {
      at::cpu::addmm_out(total_, total_, left, right, first_ ? 0 : 1, scale_);
    }
    first_ = false;
  }

  at::Tensor result() { return wide_ ? total_.mul_(scale_).to(type_) : total_; }

 private:
  double scale_;
  bool wide_, first_ = true;
  at::Tensor total_;
  at::ScalarType type_;
};

// [rows, width], features side by side.
at::Tensor matrix(const at::Tensor& t) {
  const at::Tensor flat = t.reshape({-1, t.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

int64_t count_rows(const at::Tensor& t) {
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) count *= t.size(d);
  return count;
}

// Memory safety only: what the public function checks for users is checked in Python.
void check(const at::Tensor& a, at::TensorList b, const at::Tensor& rows,
           at::ArrayRef<double> scaling, int64_t threshold,
           const std::optional<at::Tensor>& seed) {
  TORCH_CHECK(a.is_cpu() && a.dim() == 2 && at::isFloatingType(a.scalar_type()),
              "plora_linear: a must be [R, K] and floating point, on the CPU, got ", a.scalar_type(),
              " ", a.sizes());
  TORCH_CHECK(!b.empty() && scaling.size() == b.size(), "plora_linear: got ", b.size(),
              " adapters and ", scaling.size(), " scales");
  int64_t rank = 0;
  for (const at::Tensor& one : b) {
    TORCH_CHECK(one.is_cpu() && one.dim() == 2 && one.scalar_type() == a.scalar_type(),
                "plora_linear: b must be [N, r] of a's dtype, got ", one.scalar_type(), " ",
                one.sizes());
    rank += one.size(1);
  }
  TORCH_CHECK(rank == a.size(0), "plora_linear: a has ", a.size(0), " rows, b ", rank, " columns");
  TORCH_CHECK(rows.is_cpu() && rows.dim() == 1 && rows.is_contiguous() &&
                  rows.scalar_type() == at::kInt,
              "plora_linear: rows must be int32 [n], contiguous, got ", rows.scalar_type(), " ",
              rows.sizes());
  TORCH_CHECK(threshold >= 0 && threshold <= 65536, "plora_linear: threshold ", threshold);
  TORCH_CHECK(!seed || (seed->is_cpu() && seed->scalar_type() == at::kLong && seed->numel() == 1),
              "plora_linear: seed must be one int64");
}

std::tuple<std::vector<at::Tensor>, at::Tensor> plora_linear_fwd(
    const at::Tensor& x, at::TensorList weights,
    const c10::List<std::optional<at::Tensor>>& biases, const at::Tensor& a, at::TensorList b,
    const at::Tensor& rows, at::ArrayRef<double> scaling, int64_t threshold,
    const std::optional<at::Tensor>& seed) {
  check(a, b, rows, scaling, threshold, seed);
  TORCH_CHECK(weights.size() == b.size() && biases.size() == b.size() && x.dim() > 0 &&
                  x.is_cpu() && x.size(-1) == a.size(1) && x.scalar_type() == a.scalar_type(),
              "plora_linear_fwd: x ", x.sizes(), " or the lists do not fit a ", a.sizes());
  const at::AutoDispatchBelowADInplaceOrView guard;
  std::vector<at::Tensor> ys;
  for (size_t i = 0; i < b.size(); ++i) {
    TORCH_CHECK(weights[i].size(0) == b[i].size(0), "plora_linear_fwd: weight ", i, " has ",
                weights[i].size(0), " outputs, b ", b[i].size(0));
    const std::optional<at::Tensor> bias = biases.get(i);
    ys.push_back(at::linear(x, weights[i], bias).contiguous());
  }
  at::Tensor h = at::empty({rows.size(0), a.size(0)}, x.options());
  if (rows.size(0) == 0) return {ys, h};

  const at::Tensor features = matrix(x);
  const Visual visual(rows, features.size(0), Dropout(threshold, seed));
  for (const Piece& piece : visual.pieces()) {
    at::Tensor own = h.narrow(0, piece.place, piece.count);
    at::cpu::mm_out(own, visual.take_dropped(features, piece), a.t());
    for (size_t i = 0, at = 0; i < b.size(); at += b[i++].size(1)) {
      const at::Tensor y = ys[i].view({-1, ys[i].size(-1)});
      visual.add_product(y, piece, own.narrow(1, at, b[i].size(1)), b[i].t(), scaling[i]);
    }
  }
  return {ys, h};
}

std::tuple<at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor,
           std::vector<at::Tensor>>
plora_linear_bwd(const at::Tensor& a, at::TensorList dy, const std::optional<at::Tensor>& x,
                 at::TensorList weights, at::TensorList b, const std::optional<at::Tensor>& h,
                 const at::Tensor& rows, at::ArrayRef<double> scaling, int64_t threshold,
                 const std::optional<at::Tensor>& seed, std::array<bool, 5> output_mask) {
  const auto [want_x, want_weight, want_bias, want_a, want_b] = output_mask;
  check(a, b, rows, scaling, threshold, seed);
  TORCH_CHECK(dy.size() == b.size() && (!want_x || weights.size() == b.size()) &&
                  (x || !(want_weight || want_a)) && (h || !want_b),
              "plora_linear_bwd: a wanted gradient misses its inputs");
  const int64_t total = count_rows(dy[0]);
  for (size_t i = 0; i < dy.size(); ++i) {
    TORCH_CHECK(dy[i].is_cpu() && dy[i].scalar_type() == a.scalar_type() &&
                    count_rows(dy[i]) == total && dy[i].size(-1) == b[i].size(0),
                "plora_linear_bwd: dy ", i, " is ", dy[i].scalar_type(), " ", dy[i].sizes());
  }
  TORCH_CHECK(!x || (x->size(-1) == a.size(1) && count_rows(*x) == total),
              "plora_linear_bwd: x is ", x->sizes());
  TORCH_CHECK(!h || (h->dim() == 2 && h->size(0) == rows.size(0) && h->size(1) == a.size(0)),
              "plora_linear_bwd: h is ", h->sizes());
  const at::AutoDispatchBelowADInplaceOrView guard;
  const size_t count = b.size();
  const auto none = [&] { return at::empty({0}, a.options()); };
  at::Tensor dx = none(), da = none(), features;
  std::vector<at::Tensor> grads, d_weight, d_bias, db;
  if (x) features = matrix(*x);
  for (size_t i = 0; i < count; ++i) {
    grads.push_back(matrix(dy[i]));
    if (want_x && i == 0) dx = at::cpu::mm(grads[0], weights[0]);
    if (want_x && i > 0) at::cpu::addmm_out(dx, dx, grads[i], weights[i], 1, 1);
    d_weight.push_back(want_weight ? at::cpu::mm(grads[i].t(), features) : none());
    d_bias.push_back(want_bias ? grads[i].sum(0) : none());
  }

  if (want_x || want_a || want_b) {
    const Visual visual(rows, total, Dropout(threshold, seed));
    const size_t pieces = visual.pieces().size();
    std::vector<Sum> sums;
    for (size_t i = 0; want_b && i < count; ++i) {
      sums.emplace_back(b[i].size(0), b[i].size(1), a, pieces, scaling[i]);
    }
    std::optional<Sum> sum_a;
    if (want_a) sum_a.emplace(a.size(0), a.size(1), a, pieces, 1);
    for (const Piece& piece : visual.pieces()) {
      at::Tensor g = at::empty({piece.count, a.size(0)}, a.options());
      for (size_t i = 0, at = 0; i < count; at += b[i++].size(1)) {
        const at::Tensor own = visual.take(grads[i], piece);
        if (want_x || want_a) {
          at::Tensor out = g.narrow(1, at, b[i].size(1));
          at::cpu::addmm_out(out, out, own, b[i], 0, scaling[i]);
        }
        if (want_b) {
          const at::Tensor seen = h->narrow(0, piece.place, piece.count);
          sums[i].add(own.t(), seen.narrow(1, at, b[i].size(1)));
        }
      }
      if (want_a) sum_a->add(g.t(), visual.take_dropped(features, piece));
      if (want_x) visual.add_dropped_product(dx, piece, g, a);
    }
    if (want_a) da = sum_a->result();
    for (Sum& sum : sums) db.push_back(sum.result());
  }
  if (want_x) {
    std::vector<int64_t> shape = dy[0].sizes().vec();
    shape.back() = a.size(1);
    dx = dx.view(shape);
  }
  while (db.size() < count) db.push_back(none());
  return {dx, d_weight, d_bias, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("plora_linear_fwd", &plora_linear_fwd);
  m.impl("plora_linear_bwd", &plora_linear_bwd);
}

}  // namespace mmkern
