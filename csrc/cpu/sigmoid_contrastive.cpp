// Sigmoid contrastive loss on the CPU: mmkern/ops/sigmoid_contrastive/reference.py specifies it.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <tuple>

#include "simd.h"
#include "tiles.h"

namespace mmkern {
namespace {

// Row sums of log(1 + e^X) and of sigma(X); logits become sigma(X). Both from u = e^-|X| <= 1.
struct LossAndWeights {
  template <class T, int W>
  static MMKERN_INLINE void run(const Block<T>& b, T scale, T bias, T* row_loss, T* row_grad) {
    using V = Vector<T, W>;
    const int64_t width = b.width();
    for (int64_t i = 0; i < b.rows; ++i) {
      T* s = b.s + i * b.ld;
      V loss{}, grad{};
      for (int64_t j = 0; j < width; j += W) {
        const V x = load<T, W>(s + j) * scale + bias;
        const V u = exponential<W>(x > 0 ? -x : x);
        const V weight = (x > 0 ? fill<T, W>(1) : u) / (u + T(1));
        loss += (x > 0 ? x : V{}) + log_one_plus<W>(u);
        grad += weight;
        store(s + j, weight);
      }
      row_loss[i] = total<T, W>(loss);
      row_grad[i] = total<T, W>(grad);
    }
  }
};

template <class T>
class Epilogue {
 public:
  Epilogue(const Geometry& g, T scale, T bias, int64_t offset, const at::TensorOptions& options)
      : diagonal(at::empty({g.rows}, options)), row_loss(at::zeros({g.rows}, options)),
        row_grad(at::zeros({g.rows}, options)), scale_(scale), bias_(bias), offset_(offset),
        band_(g.band), parts_(at::empty({g.chunk / STRIP, 2, g.band}, options)) {}

  void block(const Block<T>& b, int64_t strip, int64_t row) {
    const bool masked = mask<T>(b, scale_, bias_, offset_, diagonal.mutable_data_ptr<T>());
    T* part = parts_.mutable_data_ptr<T>() + strip * 2 * band_ + row;
    simd<LossAndWeights, T>(b, masked ? T(1) : scale_, masked ? T(0) : bias_, part, part + band_);
  }

  // Strips in order: the result does not depend on which thread had which.
  void finish(const Tile& t) {
    T* loss = row_loss.mutable_data_ptr<T>() + t.row;
    T* grad = row_grad.mutable_data_ptr<T>() + t.row;
    for (int64_t strip = 0; strip < t.strips(); ++strip) {
      const T* part = parts_.const_data_ptr<T>() + strip * 2 * band_;
      for (int64_t i = 0; i < t.rows; ++i) {
        loss[i] += part[i];
        grad[i] += part[band_ + i];
      }
    }
  }

  at::Tensor diagonal, row_loss, row_grad;

 private:
  T scale_, bias_;
  int64_t offset_, band_;
  at::Tensor parts_;  // [strips, 2, band]: loss and gradient of a tile's rows
};

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Outputs run(const char* op, const at::Tensor& image, const at::Tensor& text,
            const at::Tensor& scale, const at::Tensor& bias, int64_t offset,
            std::array<bool, 2> output_mask) {
  check_inputs(op, image, text, scale, offset);
  TORCH_CHECK(bias.is_cpu() && bias.numel() == 1, op, ": bias must have one element on the CPU");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return with_tiles(image, text, output_mask, std::nullopt, [&](auto tiles) {
    using T = typename decltype(tiles)::Scalar;
    Epilogue<T> epilogue(tiles, scale.item().to<T>(), bias.item().to<T>(), offset,
                         tiles.d_image.options());
    sweep(tiles, epilogue);
    return Outputs(epilogue.row_loss, epilogue.diagonal, epilogue.row_grad, tiles.d_image,
                   tiles.d_text);
  });
}

std::tuple<at::Tensor, at::Tensor> sigmoid_contrastive_fwd(const at::Tensor& image,
                                                           const at::Tensor& text,
                                                           const at::Tensor& scale,
                                                           const at::Tensor& bias,
                                                           int64_t offset) {
  const auto [row_loss, diagonal, row_grad, d_image, d_text] =
      run("sigmoid_contrastive_fwd", image, text, scale, bias, offset, {false, false});
  return {row_loss, diagonal};
}

Outputs sigmoid_contrastive_fwd_bwd(const at::Tensor& image, const at::Tensor& text,
                                    const at::Tensor& scale, const at::Tensor& bias,
                                    int64_t offset, std::array<bool, 2> output_mask) {
  return run("sigmoid_contrastive_fwd_bwd", image, text, scale, bias, offset, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmkern, CPU, m) {
  m.impl("sigmoid_contrastive_fwd", &sigmoid_contrastive_fwd);
  m.impl("sigmoid_contrastive_fwd_bwd", &sigmoid_contrastive_fwd_bwd);
}

}  // namespace mmkern
