// The Python module mmkern._C. Importing it registers the operators' CPU kernels; its functions
// only say what was built and what this processor runs.
#include <ATen/Config.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <algorithm>
#include <string>

#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace mmkern {
void limit_attention(int level);
}

namespace {

std::string cpu_kernels() {
  const char* names[] = {"base", "avx2", "avx512"};
  std::string blas = AT_MKL_ENABLED() ? "MKL" : "torch's";
  std::string text = names[static_cast<int>(mmkern::isa())];
  text += ", " + blas + " GEMM";
  return text + (mmkern::use_brgemm(at::kBFloat16) ? ", brgemm for bf16" : "");
}

void force_tile_path(const std::string& path) {
  if (path != "auto" && path != "portable") {
    throw std::invalid_argument("force_tile_path: path must be 'auto' or 'portable', got '" + path +
                                "'");
  }
  mmkern::force_brgemm(path == "portable");
}

void limit_attention(const std::string& set) {
  const char* names[] = {"base", "avx2", "avx512", "all"};
  const auto found = std::find(names, names + 4, set);
  if (found == names + 4) {
    throw std::invalid_argument("limit_attention: base, avx2, avx512 or all, got '" + set + "'");
  }
  mmkern::limit_attention(found - names);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
    return info;
  }, "Versions of torch and of the compiler that this was built with.");
  m.def("cpu_kernels", &cpu_kernels, "Instruction set and matrix product that the kernels use.");
  m.def("force_tile_path", &force_tile_path, pybind11::arg("path"),
        "For tests: 'portable' sends bf16 through the packed tiles of the brgemm path, with a plain "
        "loop for their products where brgemm is missing; 'auto' undoes it.");
  m.def("limit_attention", &limit_attention, pybind11::arg("set"),
        "For tests: the widest instruction set that attention may use: base, avx2, avx512, or all.");
}
