// Tiles of S = image · textᵀ: who computes them, who owns them, and the products with what the
// epilogue makes of them. S never exists as a whole.
//
// A tile is a band of rows by a chunk of columns. It is cut into strips of STRIP columns, one
// worker each, and a strip into blocks of BLOCK rows, which an epilogue reads (and in a backward
// overwrites with weights) while they are in cache. DenseTiles leaves the products to at::mm and
// its threads. BrgemmTiles makes bf16 logits a block at a time inside the workers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

namespace mmkern {

constexpr int64_t BLOCK = 64;
constexpr int64_t STRIP = 256;
constexpr int64_t BAND = 512;
constexpr int64_t LANES = 16;  // blocks are readable and writable up to a multiple of this width

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct Tile {
  int64_t row, rows, column, columns;
  int64_t strips() const { return (columns + STRIP - 1) / STRIP; }
};

template <class T>
struct Block {
  T* s;
  int64_t ld, row, rows, column, columns;
  int64_t width() const { return round_up(columns, LANES); }
  // Calls f(row in the block, column in the block) for the positives, column = row + offset.
  template <class F>
  void positives(int64_t offset, F f) const {
    const int64_t shift = row + offset - column;
    for (int64_t i = std::max<int64_t>(0, -shift); i < std::min(rows, columns - shift); ++i) {
      f(i, i + shift);
    }
  }
};

// x = scale · s + bias in place where the block holds positives or columns past the end, which
// become -inf; the positives' logits go to `diagonal`. True if it did, else nothing has changed.
template <class T>
bool mask(const Block<T>& b, T scale, T bias, int64_t offset, T* diagonal) {
  const int64_t shift = b.row + offset - b.column;
  const bool positives = shift < b.columns && shift + b.rows > 0;
  if (!positives && b.width() == b.columns) return false;
  for (int64_t i = 0; i < b.rows; ++i) {
    T* x = b.s + i * b.ld;
    for (int64_t j = 0; j < b.columns; ++j) x[j] = x[j] * scale + bias;
    std::fill(x + b.columns, x + b.width(), -std::numeric_limits<T>::infinity());
  }
  b.positives(offset, [&](int64_t i, int64_t j) {
    diagonal[b.row + i] = b.s[i * b.ld + j];
    b.s[i * b.ld + j] = -std::numeric_limits<T>::infinity();
  });
  return true;
}

// What both kinds of tiles share: the inputs' sizes and which products are wanted.
struct Geometry {
  int64_t rows, columns, width, band, chunk;
  bool want_image, want_text;

  Geometry(const at::Tensor& image, const at::Tensor& text, std::array<bool, 2> wanted)
      : rows(image.size(0)), columns(text.size(0)), width(image.size(1)),
        band(std::min(BAND, round_up(rows, BLOCK))),
        // Four strips a thread, and 4 to 32 MiB of fp32 logits.
        chunk(std::min(std::clamp<int64_t>(4 * at::get_num_threads(), 8, 64) * STRIP,
                       round_up(columns, STRIP))),
        want_image(wanted[0]), want_text(wanted[1]) {}
};

// Logits in fp32 or fp64 by at::mm, or copied from `dots` = image · textᵀ where the caller has it;
// weights replace them, and at::addmm forms the products.
template <class T>
class DenseTiles : public Geometry {
 public:
  using Scalar = T;

  DenseTiles(const at::Tensor& image, const at::Tensor& text, std::array<bool, 2> wanted,
             const std::optional<at::Tensor>& dots)
      : Geometry(image, text, wanted),
        image_(image.to(c10::CppTypeToScalarType<T>::value).contiguous()),
        text_(text.to(image_.scalar_type()).contiguous()),
        // The odd leading dimension keeps a block's rows from falling into the same cache sets.
        logits_(at::empty({band, chunk + LANES}, image_.options())), dots_(dots) {
    const auto make = [&](bool want, const at::Tensor& like) {
      if (!want) return at::empty({0}, image_.options());
      return rows > 0 ? at::empty(like.sizes(), image_.options())
                      : at::zeros(like.sizes(), image_.options());
    };
    d_image = make(want_image, image);
    d_text = make(want_text, text);
  }

  void start(const Tile& t) {
    at::Tensor out = view(t);
    if (dots_) {
      out.copy_(dots_->narrow(0, t.row, t.rows).narrow(1, t.column, t.columns));
      return;
    }
    at::cpu::mm_out(out, image_.narrow(0, t.row, t.rows), text_.narrow(0, t.column, t.columns).t());
  }

  void start_strip(const Tile&, int64_t) {}

  Block<T> block(const Tile& t, int64_t strip, int64_t row) {
    const int64_t ld = logits_.size(1);
    T* s = logits_.mutable_data_ptr<T>() + row * ld + strip * STRIP;
    return {s, ld, t.row + row, std::min(BLOCK, t.rows - row), t.column + strip * STRIP,
            std::min(STRIP, t.columns - strip * STRIP)};
  }

  void keep(const Tile&, const Block<T>&) {}
  void finish_strip(const Tile&, int64_t) {}
  void release() {}

  void finish(const Tile& t) {
    const at::Tensor weights = view(t);
    if (want_image) {
      at::Tensor out = d_image.narrow(0, t.row, t.rows);
      const double beta = t.column > 0;
      at::cpu::addmm_out(out, out, weights, text_.narrow(0, t.column, t.columns), beta, 1);
    }
    if (want_text) {
      at::Tensor out = d_text.narrow(0, t.column, t.columns);
      at::cpu::addmm_out(out, out, weights.t(), image_.narrow(0, t.row, t.rows), t.row > 0, 1);
    }
  }

  void finish_chunk(int64_t, int64_t) {}

  at::Tensor d_image, d_text;

 private:
  at::Tensor view(const Tile& t) {
    return logits_.narrow(0, 0, t.rows).narrow(1, 0, t.columns);
  }

  at::Tensor image_, text_, logits_;
  std::optional<at::Tensor> dots_;
};

// bf16 logits by oneDNN's brgemm micro-kernel (AMX or AVX512_BF16), weights rounded to bf16, sums in fp32.
//
// brgemm wants its right operand with pairs of rows interleaved (VNNI: [K/2][N][2]), generates code
// per shape and runs on one thread. So everything is padded with zeros to three shapes a width:
//   logits    [BLOCK, STRIP]  = image rows [BLOCK, D]  · text   VNNI [D/2][STRIP][2]
//   d_textᵀ  [D, STRIP]     += imageᵀ     [D, band]   · weights VNNI [band/2][STRIP][2]
//   d_image   [BLOCK, D]     += weights    [BLOCK, STRIP] · text VNNI [STRIP/2][D][2]
// Text is packed once by the worker that owns the strip, images once for all chunks.
class BrgemmTiles : public Geometry {
 public:
  using Scalar = float;

  BrgemmTiles(const at::Tensor& image, const at::Tensor& text, std::array<bool, 2> wanted);

  void start(const Tile&) {}
  void start_strip(const Tile& t, int64_t strip);
  Block<float> block(const Tile& t, int64_t strip, int64_t row);
  void keep(const Tile& t, const Block<float>& b);
  void finish_strip(const Tile& t, int64_t strip);
  void release();
  void finish(const Tile& t);
  void finish_chunk(int64_t column, int64_t columns);

  at::Tensor d_image, d_text;

 private:
  bool grads() const { return want_image || want_text; }

  int64_t depth_;               // D, padded
  at::Tensor text_;             // [M, D] as given
  at::Tensor image_rows_;       // [B padded, depth]
  at::Tensor image_columns_;    // [bands, depth, band]
  at::Tensor text_logits_;      // of a chunk: [strips, depth/2, STRIP, 2]
  at::Tensor text_grads_;       // of a chunk: [strips, STRIP/2, depth, 2]
  at::Tensor d_text_columns_;   // of a chunk: [strips, depth, STRIP], fp32
  at::Tensor weights_;          // of a tile: [band, chunk]
  at::Tensor logits_;           // of each worker: [BLOCK, STRIP], fp32
  at::Tensor pairs_;            // of each worker, a strip's weights: [band/2, STRIP, 2]
};

// Whether an operator on this dtype takes BrgemmTiles: bf16 where brgemm has hardware for it.
bool use_brgemm(at::ScalarType dtype);

// Tests only. True sends bf16 through BrgemmTiles on any machine, a plain loop standing in for
// brgemm where that is missing.
void force_brgemm(bool forced);

// C [M, N] = A [M, K] · B (+ C) where use_brgemm holds, B in VNNI order [K/2][N][2]: brgemm's
// contract. A worker calls tile_release() after its last product.
void tile_gemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
               const at::BFloat16* a, const at::BFloat16* b, float* c);
void tile_release();

// `count` rows [count, width] as that right operand's columns: [depth/2][strip][2], zeros beyond.
void pack_columns(const at::BFloat16* source, int64_t count, int64_t width, int64_t strip,
                  int64_t depth, at::BFloat16* out);

// Runs the epilogue over all tiles. Chunks are the outer loop: a chunk's packed text and sums stay,
// and column statistics belong to one worker at a time whatever the number of threads.
template <class Tiles, class Epilogue>
void sweep(Tiles& tiles, Epilogue& epilogue) {
  for (int64_t column = 0; column < tiles.columns; column += tiles.chunk) {
    const int64_t columns = std::min(tiles.chunk, tiles.columns - column);
    for (int64_t row = 0; row < tiles.rows; row += tiles.band) {
      const Tile t{row, std::min(tiles.band, tiles.rows - row), column, columns};
      tiles.start(t);
      at::parallel_for(0, t.strips(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t strip = begin; strip < end; ++strip) {
          tiles.start_strip(t, strip);
          for (int64_t r = 0; r < t.rows; r += BLOCK) {
            const auto b = tiles.block(t, strip, r);
            epilogue.block(b, strip, r);
            tiles.keep(t, b);
          }
          tiles.finish_strip(t, strip);
        }
        tiles.release();
      });
      epilogue.finish(t);
      tiles.finish(t);
    }
    if (tiles.rows > 0) tiles.finish_chunk(column, columns);
  }
}

// f(tiles) with the kind of tiles that this dtype takes.
template <class F>
auto with_tiles(const at::Tensor& image, const at::Tensor& text, std::array<bool, 2> wanted,
                const std::optional<at::Tensor>& dots, F f) {
  const auto dtype = image.scalar_type();
  if (!dots && use_brgemm(dtype)) return f(BrgemmTiles(image, text, wanted));
  if (dtype == at::kDouble) return f(DenseTiles<double>(image, text, wanted, dots));
  return f(DenseTiles<float>(image, text, wanted, dots));
}

// Memory safety only: what the public functions check for users is checked in Python.
void check_inputs(const char* op, const at::Tensor& image, const at::Tensor& text,
                  const at::Tensor& scale, int64_t offset,
                  const std::optional<at::Tensor>& dots = std::nullopt);

}  // namespace mmkern
