// The Python module sda_fast._core: a table of entry points that take addresses as integers. The only file
// that knows Python, and the only one that throws. Shapes, dtypes and devices are checked by the callers in
// sda_fast/ops.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/group_norm_silu.h"
#include "cpu/philox_normal.h"
#include "status.h"

#ifdef SDA_CUDA
#include "cuda/philox_normal.cuh"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void check(int status) {
    if (status == sda::kOk) return;
    if (status == sda::kBadArgument) throw std::invalid_argument("a size is negative or too large");
    if (status == sda::kBadDtype) throw std::invalid_argument("this dtype is not supported");
#ifdef SDA_CUDA
    if (status >= sda::kCudaErrorBase) {
        throw std::runtime_error("CUDA error " + std::to_string(status - sda::kCudaErrorBase) + ": " +
                                 sda::cuda::error_string(status));
    }
#endif
    throw std::runtime_error("unknown status " + std::to_string(status));
}

sda::ImageLayout layout(int64_t images, int64_t outer, int64_t inner, int64_t stride_image,
                        int64_t stride_outer, int64_t stride_inner) {
    return {images, outer, inner, stride_image, stride_outer, stride_inner};
}

void bind_philox_normal(py::module_& m) {
    using sda::ImageLayout;
    m.def(
        "philox_normal_cpu",
        [](Address out, int dtype, const ImageLayout& where, uint64_t seed, Address identities, uint32_t step,
           int threads) {
            check(sda::cpu::philox_normal(pointer<void>(out), dtype, where, seed,
                                          pointer<int64_t>(identities), step, threads));
        },
        py::arg("out"), py::arg("dtype"), py::arg("layout"), py::arg("seed"), py::arg("identities"),
        py::arg("step"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "philox_words_cpu",
        [](Address out, int64_t images, int64_t blocks, int64_t first_block, uint64_t seed,
           Address identities, uint32_t step) {
            check(sda::cpu::philox_words(pointer<uint32_t>(out), images, blocks, first_block, seed,
                                         pointer<int64_t>(identities), step));
        },
        py::arg("out"), py::arg("images"), py::arg("blocks"), py::arg("first_block"), py::arg("seed"),
        py::arg("identities"), py::arg("step"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "box_muller_cpu",
        [](Address out, Address words, int64_t pairs) {
            check(sda::cpu::box_muller_pairs(pointer<float>(out), pointer<uint32_t>(words), pairs));
        },
        py::arg("out"), py::arg("words"), py::arg("pairs"), py::call_guard<py::gil_scoped_release>());
#ifdef SDA_CUDA
    m.def(
        "philox_normal_cuda",
        [](Address out, int dtype, const ImageLayout& where, uint64_t seed, Address identities, uint32_t step,
           Address stream) {
            check(sda::cuda::philox_normal(pointer<void>(out), dtype, where, seed,
                                           pointer<int64_t>(identities), step, pointer<void>(stream)));
        },
        py::arg("out"), py::arg("dtype"), py::arg("layout"), py::arg("seed"), py::arg("identities"),
        py::arg("step"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "philox_words_cuda",
        [](Address out, int64_t images, int64_t blocks, int64_t first_block, uint64_t seed,
           Address identities, uint32_t step, Address stream) {
            check(sda::cuda::philox_words(pointer<uint32_t>(out), images, blocks, first_block, seed,
                                          pointer<int64_t>(identities), step, pointer<void>(stream)));
        },
        py::arg("out"), py::arg("images"), py::arg("blocks"), py::arg("first_block"), py::arg("seed"),
        py::arg("identities"), py::arg("step"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#endif
}

void bind_group_norm_silu(py::module_& m) {
    using sda::cpu::NormLayout;
    using sda::cpu::NormParameters;
    py::class_<NormLayout>(m, "NormLayout")
        .def(py::init([](int64_t images, int64_t channels, int64_t spatial, int64_t stride_image,
                         int64_t stride_channel, int64_t stride_spatial) {
                 return NormLayout{images, channels, spatial, stride_image, stride_channel, stride_spatial};
             }),
             py::arg("images"), py::arg("channels"), py::arg("spatial"), py::arg("stride_image"),
             py::arg("stride_channel"), py::arg("stride_spatial"));
    py::class_<NormParameters>(m, "NormParameters")
        .def(py::init([](Address weight, Address bias, Address scale, Address shift, int64_t stride_scale,
                         int64_t stride_shift, int64_t groups, bool silu) {
                 return NormParameters{pointer<float>(weight),
                                       pointer<float>(bias),
                                       pointer<float>(scale),
                                       pointer<float>(shift),
                                       stride_scale,
                                       stride_shift,
                                       groups,
                                       silu};
             }),
             py::arg("weight"), py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("stride_scale"),
             py::arg("stride_shift"), py::arg("groups"), py::arg("silu"));
    m.def(
        "group_norm_silu_cpu",
        [](Address x, Address y, Address mean, Address rstd, int dtype, const NormLayout& where_x,
           const NormLayout& where_y, const NormParameters& parameters, double eps, int threads) {
            check(sda::cpu::group_norm_silu(pointer<void>(x), pointer<void>(y), pointer<float>(mean),
                                            pointer<float>(rstd), dtype, where_x, where_y, parameters, eps,
                                            threads));
        },
        py::arg("x"), py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("dtype"), py::arg("where_x"),
        py::arg("where_y"), py::arg("parameters"), py::arg("eps"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "group_norm_silu_backward_cpu",
        [](Address dy, Address x, Address dx, Address mean, Address rstd, int dtype,
           const NormLayout& where_dy, const NormLayout& where_x, const NormLayout& where_dx,
           const NormParameters& parameters, int threads) {
            check(sda::cpu::group_norm_silu_backward(pointer<void>(dy), pointer<void>(x), pointer<void>(dx),
                                                     pointer<float>(mean), pointer<float>(rstd), dtype,
                                                     where_dy, where_x, where_dx, parameters, threads));
        },
        py::arg("dy"), py::arg("x"), py::arg("dx"), py::arg("mean"), py::arg("rstd"), py::arg("dtype"),
        py::arg("where_dy"), py::arg("where_x"), py::arg("where_dx"), py::arg("parameters"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Compiled operators of sda_fast, on raw addresses; use sda_fast.ops.";
#ifdef SDA_CUDA
    m.attr("cuda_built") = true;
    m.attr("cuda_architectures") = SDA_CUDA;
#else
    m.attr("cuda_built") = false;
    m.attr("cuda_architectures") = "";
#endif
    m.attr("float32") = static_cast<int>(sda::kFloat32);
    m.attr("bfloat16") = static_cast<int>(sda::kBfloat16);
    m.attr("float16") = static_cast<int>(sda::kFloat16);
    py::class_<sda::ImageLayout>(m, "ImageLayout")
        .def(py::init(&layout), py::arg("images"), py::arg("outer"), py::arg("inner"),
             py::arg("stride_image"), py::arg("stride_outer"), py::arg("stride_inner"));
    bind_group_norm_silu(m);
    bind_philox_normal(m);
}
