#include "tiles.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <atomic>
#include <bit>

#include "simd.h"

namespace mmkern {
namespace {

using at::BFloat16;
namespace cpublas = at::native::cpublas;

std::atomic<bool> forced{false};

// could_pack speaks of AMX only, but brgemm's kernels keep their rate with avx512_bf16 as well:
// more than four times sgemm's where both were measured.
bool has_brgemm() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool bf16 = __builtin_cpu_supports("avx512bf16");
#else
  static const bool bf16 = false;
#endif
  return cpublas::could_pack(at::kBFloat16) || (bf16 && at::globalContext().userEnabledMkldnn());
}

BFloat16* bf16(at::Tensor& t) { return t.mutable_data_ptr<BFloat16>(); }

// out[j * out_ld + i] = in[i * in_ld + j], in squares that stay in the first-level cache.
template <class T>
void transpose(const T* in, int64_t in_ld, int64_t rows, int64_t columns, T* out, int64_t out_ld) {
  constexpr int64_t SIDE = 32;
  for (int64_t i0 = 0; i0 < rows; i0 += SIDE) {
    for (int64_t j0 = 0; j0 < columns; j0 += SIDE) {
      const int64_t i1 = std::min(i0 + SIDE, rows);
      for (int64_t j = j0; j < std::min(j0 + SIDE, columns); ++j) {
        for (int64_t i = i0; i < i1; ++i) out[j * out_ld + i] = in[i * in_ld + j];
      }
    }
  }
}

// Two rows of bf16 as one row of pairs; a missing row counts as zeros.
void interleave(const BFloat16* even, const BFloat16* odd, int64_t n, BFloat16* out) {
  for (int64_t j = 0; j < n; ++j) {
    out[2 * j] = even ? even[j] : BFloat16(0.f);
    out[2 * j + 1] = odd ? odd[j] : BFloat16(0.f);
  }
}

// A pair of fp32 rows to bf16, to nearest even: as rows, and interleaved.
struct RoundPair {
  template <class T, int W>
  static MMKERN_INLINE Vector<uint32_t, W> bits(const float* p) {
    using U = Vector<uint32_t, W>;
    const Vector<float, W> x = load<float, W>(p);
    const U u = (U)x;
    const U rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return x == x ? rounded : (U{} + 0x7fc00000u);
  }

  template <class T, int W>
  static MMKERN_INLINE void run(const float* even, const float* odd, int64_t n, uint16_t* even_out,
                                uint16_t* odd_out, uint32_t* pairs) {
    using H = Vector<uint16_t, W>;
    for (int64_t j = 0; j < n; j += W) {
      const auto low = bits<T, W>(even + j) >> 16;
      const auto high = bits<T, W>(odd + j);
      store(even_out + j, __builtin_convertvector(low, H));
      store(odd_out + j, __builtin_convertvector(high >> 16, H));
      store(pairs + j, low | (high & 0xffff0000u));
    }
  }
};

}  // namespace

bool use_brgemm(at::ScalarType dtype) {
  return dtype == at::kBFloat16 && (forced || has_brgemm());
}

void force_brgemm(bool value) { forced = value; }

void tile_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
               const BFloat16* a, const BFloat16* b, float* c) {
  if (has_brgemm()) {
    return cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/true);
  }
  for (int64_t i = 0; i < m; ++i) {
    float* row = c + i * ldc;
    if (!add) std::fill(row, row + n, 0.f);
    for (int64_t p = 0; p < k; p += 2) {
      const float a0 = a[i * lda + p], a1 = a[i * lda + p + 1];
      const BFloat16* pair = b + p * ldb;
      for (int64_t j = 0; j < n; ++j) {
        row[j] += a0 * static_cast<float>(pair[2 * j]) + a1 * static_cast<float>(pair[2 * j + 1]);
      }
    }
  }
}

void tile_release() {
  if (has_brgemm()) cpublas::brgemm_release();
}

void pack_columns(const BFloat16* source, int64_t count, int64_t width, int64_t strip,
                  int64_t depth, BFloat16* out) {
  // Pairs of features move as one 32-bit word; an odd last feature and padding are zeros.
  std::fill(out, out + depth * strip, BFloat16(0.f));
  if (width % 2 == 0) {
    transpose(reinterpret_cast<const uint32_t*>(source), width / 2, count, width / 2,
              reinterpret_cast<uint32_t*>(out), strip);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t d = 0; d < width; ++d) {
      out[(d / 2 * strip + j) * 2 + d % 2] = source[j * width + d];
    }
  }
}

void check_inputs(const char* op, const at::Tensor& image, const at::Tensor& text,
                  const at::Tensor& scale, int64_t offset,
                  const std::optional<at::Tensor>& dots) {
  TORCH_CHECK(image.dim() == 2 && text.dim() == 2 && image.size(1) == text.size(1), op,
              ": image [B, D] and text [M, D] expected, got ", image.sizes(), " and ",
              text.sizes());
  TORCH_CHECK(image.scalar_type() == text.scalar_type(), op, ": image is ", image.scalar_type(),
              " but text is ", text.scalar_type());
  TORCH_CHECK(at::isFloatingType(image.scalar_type()), op, ": floating point inputs expected, got ",
              image.scalar_type());
  TORCH_CHECK(image.is_cpu() && text.is_cpu() && scale.is_cpu(), op, ": CPU tensors expected");
  TORCH_CHECK(scale.numel() == 1, op, ": scale must have one element, got ", scale.sizes());
  TORCH_CHECK(offset >= 0 && offset + image.size(0) <= text.size(0), op, ": rows ", offset, " to ",
              offset + image.size(0), " of text expected, but it has ", text.size(0));
  TORCH_CHECK(!dots || (dots->is_cpu() && dots->dim() == 2 && dots->size(0) == image.size(0) &&
                        dots->size(1) == text.size(0)),
              op, ": dots must be [", image.size(0), ", ", text.size(0), "] on the CPU");
}

BrgemmTiles::BrgemmTiles(const at::Tensor& image, const at::Tensor& text,
                         std::array<bool, 2> wanted)
    : Geometry(image, text, wanted), depth_(round_up(width, 32)), text_(text.contiguous()) {
  const auto half = text_.options(), single = half.dtype(at::kFloat);
  const int64_t workers = at::get_num_threads(), strips = chunk / STRIP;
  const int64_t bands = band > 0 ? (rows + band - 1) / band : 0;
  const at::Tensor source = image.contiguous();
  image_rows_ = at::zeros({bands * band, depth_}, half);
  image_rows_.narrow(0, 0, rows).narrow(1, 0, width).copy_(source);
  text_logits_ = at::empty({strips, depth_ / 2, STRIP, 2}, half);
  logits_ = at::empty({workers, BLOCK, STRIP}, single);
  d_image = at::empty({0}, single);
  d_text = at::empty({0}, single);
  if (!grads()) return;
  weights_ = at::empty({band, chunk}, half);
  pairs_ = at::empty({workers, band / 2, STRIP, 2}, half);
  if (want_image) {
    text_grads_ = at::empty({strips, STRIP / 2, depth_, 2}, half);
    d_image = at::empty({bands * band, depth_}, single);
  }
  if (want_text) {
    image_columns_ = at::empty({bands, depth_, band}, half);
    d_text_columns_ = at::empty({strips, depth_, STRIP}, single);
    d_text = rows > 0 ? at::empty({columns, width}, single) : at::zeros({columns, width}, single);
    at::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        transpose(bf16(image_rows_) + i * band * depth_, depth_, band, depth_,
                  bf16(image_columns_) + i * band * depth_, band);
      }
    });
  }
}

void BrgemmTiles::start_strip(const Tile& t, int64_t strip) {
  if (t.row > 0) return;  // packed by the first band
  const int64_t first = t.column + strip * STRIP;
  const int64_t count = std::min(STRIP, columns - first);
  const BFloat16* source = text_.const_data_ptr<BFloat16>() + first * width;
  pack_columns(source, count, width, STRIP, depth_, bf16(text_logits_) + strip * depth_ * STRIP);
  if (!want_image) return;
  BFloat16* grads = bf16(text_grads_) + strip * STRIP * depth_;
  std::fill(grads, grads + STRIP * depth_, BFloat16(0.f));
  for (int64_t j = 0; j < count; j += 2) {
    const BFloat16* even = source + j * width;
    interleave(even, j + 1 < count ? even + width : nullptr, width, grads + j * depth_);
  }
}

Block<float> BrgemmTiles::block(const Tile& t, int64_t strip, int64_t row) {
  float* s = logits_.mutable_data_ptr<float>() + at::get_thread_num() * BLOCK * STRIP;
  tile_gemm(BLOCK, STRIP, depth_, depth_, STRIP, STRIP, false,
            bf16(image_rows_) + (t.row + row) * depth_,
            bf16(text_logits_) + strip * depth_ * STRIP, s);
  return {s, STRIP, t.row + row, std::min(BLOCK, t.rows - row), t.column + strip * STRIP,
          std::min(STRIP, t.columns - strip * STRIP)};
}

void BrgemmTiles::keep(const Tile& t, const Block<float>& b) {
  if (!grads()) return;
  // Padding is zeroed rather than trusted: 0 · NaN in a product would be NaN.
  for (int64_t i = 0; i < b.rows; ++i) {
    std::fill(b.s + i * b.ld + b.columns, b.s + i * b.ld + STRIP, 0.f);
  }
  std::fill(b.s + b.rows * b.ld, b.s + BLOCK * b.ld, 0.f);
  const int64_t row = b.row - t.row;
  auto* rows_out = reinterpret_cast<uint16_t*>(bf16(weights_)) + row * chunk + b.column - t.column;
  auto* pairs_out = reinterpret_cast<uint32_t*>(bf16(pairs_)) +
                    (at::get_thread_num() * band + row) / 2 * STRIP;
  for (int64_t i = 0; i < BLOCK; i += 2) {
    const float* s = b.s + i * b.ld;
    uint16_t* even = rows_out + i * chunk;
    simd<RoundPair, float>(s, s + b.ld, STRIP, even, even + chunk, pairs_out + i / 2 * STRIP);
  }
}

void BrgemmTiles::finish_strip(const Tile& t, int64_t strip) {
  if (!want_text) return;
  BFloat16* pairs = bf16(pairs_) + at::get_thread_num() * band * STRIP;
  const int64_t filled = round_up(t.rows, BLOCK);
  std::fill(pairs + filled * STRIP, pairs + band * STRIP, BFloat16(0.f));
  tile_gemm(depth_, STRIP, band, band, STRIP, STRIP, t.row > 0,
            bf16(image_columns_) + t.row * depth_, pairs,
            d_text_columns_.mutable_data_ptr<float>() + strip * depth_ * STRIP);
}

void BrgemmTiles::release() { tile_release(); }

void BrgemmTiles::finish(const Tile& t) {
  if (!want_image) return;
  at::parallel_for(0, round_up(t.rows, BLOCK) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = d_image.mutable_data_ptr<float>() + (t.row + i * BLOCK) * depth_;
      for (int64_t strip = 0; strip < t.strips(); ++strip) {
        tile_gemm(BLOCK, depth_, STRIP, chunk, depth_, depth_, t.column > 0 || strip > 0,
                  bf16(weights_) + i * BLOCK * chunk + strip * STRIP,
                  bf16(text_grads_) + strip * STRIP * depth_, out);
      }
    }
    release();
  });
  const bool last = t.row + t.rows == rows && t.column + t.columns == columns;
  if (last) d_image = d_image.narrow(0, 0, rows).narrow(1, 0, width).contiguous();
}

void BrgemmTiles::finish_chunk(int64_t column, int64_t count) {
  if (!want_text) return;
  at::parallel_for(0, (count + STRIP - 1) / STRIP, 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * STRIP;
      transpose(d_text_columns_.const_data_ptr<float>() + first * depth_, STRIP, width,
                std::min(STRIP, count - first),
                d_text.mutable_data_ptr<float>() + (column + first) * width, width);
    }
  });
}

}  // namespace mmkern
