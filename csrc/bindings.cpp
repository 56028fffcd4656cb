// The Python module sda_fast._core: a table of entry points that take addresses as integers. The only file
// that knows Python, and the only one that throws. Shapes, dtypes and devices are checked by the callers in
// sda_fast/ops.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/group_norm_silu.h"
#include "cpu/guidance.h"
#include "cpu/philox_normal.h"
#include "cpu/reverse_step.h"
#include "cpu/to_uint8.h"
#include "cpu/winograd_convolution.h"
#include "cuda/guidance_plan.h"
#include "status.h"

#ifdef SDA_CUDA
#include "cuda/guidance.cuh"
#include "cuda/philox_normal.cuh"
#include "cuda/reverse_step.cuh"
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

void bind_reverse_step(py::module_& m) {
    using sda::Pixels;
    using sda::ReverseStep;
    py::class_<Pixels>(m, "Pixels")
        .def(py::init([](Address data, int64_t stride_image, int64_t stride_channel, int64_t stride_pixel) {
                 return Pixels{pointer<void>(data), stride_image, stride_channel, stride_pixel};
             }),
             py::arg("data"), py::arg("stride_image"), py::arg("stride_channel"), py::arg("stride_pixel"));
    py::class_<ReverseStep>(m, "ReverseStep")
        .def(py::init([](int64_t images, int64_t channels, int64_t pixels, int dtype,
                         int through_network_dtype, bool learned, bool clip, const Pixels& x,
                         const Pixels& out, const Pixels& noise, const Pixels& cotangent,
                         const Pixels& through_network, const Pixels& result, Address table, Address position,
                         Address identities, Address squares, int64_t steps, uint64_t seed, float scale,
                         bool joint, int64_t norm_group, int64_t real) {
                 return ReverseStep{images,
                                    channels,
                                    pixels,
                                    dtype,
                                    through_network_dtype,
                                    learned,
                                    clip,
                                    x,
                                    out,
                                    noise,
                                    cotangent,
                                    through_network,
                                    result,
                                    pointer<float>(table),
                                    pointer<int64_t>(position),
                                    pointer<int64_t>(identities),
                                    pointer<float>(squares),
                                    steps,
                                    seed,
                                    scale,
                                    joint,
                                    norm_group,
                                    real};
             }),
             py::kw_only(), py::arg("images"), py::arg("channels"), py::arg("pixels"), py::arg("dtype"),
             py::arg("through_network_dtype"), py::arg("learned"), py::arg("clip"), py::arg("x"),
             py::arg("out"), py::arg("noise"), py::arg("cotangent"), py::arg("through_network"),
             py::arg("result"), py::arg("table"), py::arg("position"), py::arg("identities"),
             py::arg("squares"), py::arg("steps"), py::arg("seed"), py::arg("scale"), py::arg("joint"),
             py::arg("norm_group"), py::arg("real"));
    m.def(
        "reverse_step_cpu",
        [](const ReverseStep& step, int threads) { check(sda::cpu::reverse_step(step, threads)); },
        py::arg("step"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
#ifdef SDA_CUDA
    m.def(
        "reverse_step_cuda",
        [](const ReverseStep& step, Address stream) {
            check(sda::cuda::reverse_step(step, pointer<void>(stream)));
        },
        py::arg("step"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#endif
}

void bind_to_uint8(py::module_& m) {
    m.def(
        "to_uint8_cpu",
        [](Address out, const sda::Pixels& x, int dtype, int64_t images, int64_t channels, int64_t pixels,
           bool truncate, int threads) {
            check(sda::cpu::to_uint8(pointer<uint8_t>(out), x, dtype, images, channels, pixels, truncate,
                                     threads));
        },
        py::arg("out"), py::arg("x"), py::arg("dtype"), py::arg("images"), py::arg("channels"),
        py::arg("pixels"), py::arg("truncate"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

sda::GuidanceTensors guidance_tensors(int64_t images, int64_t channels, int64_t size, int64_t low, int dtype,
                                      bool interleaved, Address x, const sda::ImageStrides& x_strides,
                                      Address out, const sda::ImageStrides& out_strides,
                                      Address reference_down, Address down, Address gram, Address table,
                                      int64_t steps, Address position, Address cotangent, Address squares,
                                      Address x0, const sda::ImageStrides& x0_strides) {
    return {images,
            channels,
            size,
            low,
            dtype,
            interleaved,
            pointer<float>(x),
            x_strides,
            pointer<void>(out),
            out_strides,
            pointer<float>(reference_down),
            pointer<float>(down),
            pointer<float>(gram),
            pointer<float>(table),
            steps,
            pointer<int64_t>(position),
            pointer<void>(cotangent),
            pointer<float>(squares),
            pointer<float>(x0),
            x0_strides};
}

void bind_guidance(py::module_& m) {
    using sda::GuidanceTensors;
    using sda::ImageStrides;
    py::class_<ImageStrides>(m, "ImageStrides")
        .def(py::init([](int64_t image, int64_t channel, int64_t row, int64_t column) {
                 return ImageStrides{image, channel, row, column};
             }),
             py::arg("image"), py::arg("channel"), py::arg("row"), py::arg("column"));
    py::class_<GuidanceTensors>(m, "GuidanceTensors")
        .def(py::init(&guidance_tensors), py::kw_only(), py::arg("images"), py::arg("channels"),
             py::arg("size"), py::arg("low"), py::arg("dtype"), py::arg("interleaved"), py::arg("x"),
             py::arg("x_strides"), py::arg("out"), py::arg("out_strides"), py::arg("reference_down"),
             py::arg("down"), py::arg("gram"), py::arg("table"), py::arg("steps"), py::arg("position"),
             py::arg("cotangent"), py::arg("squares"), py::arg("x0"), py::arg("x0_strides"));
    m.def("guidance_cpu_workspace", &sda::cpu::guidance_workspace, py::arg("tensors"), py::arg("threads"));
    m.def(
        "guidance_cpu",
        [](const GuidanceTensors& tensors, Address workspace, int threads) {
            check(sda::cpu::guidance(tensors, pointer<void>(workspace), threads));
        },
        py::arg("tensors"), py::arg("workspace"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "guidance_cuda_fits",
        [](int64_t channels, int64_t size, int64_t low, bool interleaved) {
            GuidanceTensors sizes{};
            sizes.channels = channels;
            sizes.size = size;
            sizes.low = low;
            sizes.interleaved = interleaved;
            return sda::cuda::guidance_fits(sizes);
        },
        py::arg("channels"), py::arg("size"), py::arg("low"), py::arg("interleaved"));
#ifdef SDA_CUDA
    m.def("guidance_cuda_workspace", &sda::cuda::guidance_workspace, py::arg("tensors"));
    m.def(
        "guidance_cuda",
        [](const GuidanceTensors& tensors, Address workspace, Address stream) {
            check(sda::cuda::guidance(tensors, pointer<void>(workspace), pointer<void>(stream)));
        },
        py::arg("tensors"), py::arg("workspace"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
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
        .def(py::init([](Address weight, Address bias, Address scale, Address shift, Address x_bias,
                         int64_t stride_scale, int64_t stride_shift, int64_t groups, bool silu) {
                 return NormParameters{pointer<float>(weight),
                                       pointer<float>(bias),
                                       pointer<float>(scale),
                                       pointer<float>(shift),
                                       pointer<float>(x_bias),
                                       stride_scale,
                                       stride_shift,
                                       groups,
                                       silu};
             }),
             py::arg("weight"), py::arg("bias"), py::arg("scale"), py::arg("shift"), py::arg("x_bias"),
             py::arg("stride_scale"), py::arg("stride_shift"), py::arg("groups"), py::arg("silu"));
    m.def("group_norm_silu_cpu_workspace", &sda::cpu::group_norm_silu_workspace, py::arg("where"),
          py::arg("threads"));
    m.def(
        "group_norm_silu_cpu",
        [](Address x, Address y, Address mean, Address rstd, int dtype, const NormLayout& where_x,
           const NormLayout& where_y, const NormParameters& parameters, double eps, Address workspace,
           int threads) {
            check(sda::cpu::group_norm_silu(pointer<void>(x), pointer<void>(y), pointer<float>(mean),
                                            pointer<float>(rstd), dtype, where_x, where_y, parameters, eps,
                                            pointer<void>(workspace), threads));
        },
        py::arg("x"), py::arg("y"), py::arg("mean"), py::arg("rstd"), py::arg("dtype"), py::arg("where_x"),
        py::arg("where_y"), py::arg("parameters"), py::arg("eps"), py::arg("workspace"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "group_norm_silu_backward_cpu",
        [](Address dy, Address x, Address dx, Address residual, Address mean, Address rstd, int dtype,
           const NormLayout& where_dy, const NormLayout& where_x, const NormLayout& where_dx,
           const NormLayout& where_residual, const NormParameters& parameters, Address workspace,
           int threads) {
            check(sda::cpu::group_norm_silu_backward(
                pointer<void>(dy), pointer<void>(x), pointer<void>(dx), pointer<void>(residual),
                pointer<float>(mean), pointer<float>(rstd), dtype, where_dy, where_x, where_dx,
                where_residual, parameters, pointer<void>(workspace), threads));
        },
        py::arg("dy"), py::arg("x"), py::arg("dx"), py::arg("residual"), py::arg("mean"), py::arg("rstd"),
        py::arg("dtype"), py::arg("where_dy"), py::arg("where_x"), py::arg("where_dx"),
        py::arg("where_residual"), py::arg("parameters"), py::arg("workspace"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}

void bind_winograd_convolution(py::module_& m) {
    using sda::cpu::WinogradConvolution;
    py::class_<WinogradConvolution>(m, "WinogradConvolution")
        .def(py::init([](int64_t images, int64_t height, int64_t width, int64_t channels, int64_t kernels,
                         int64_t columns, Address x, int64_t x_stride_image, int64_t x_stride_row,
                         int64_t x_stride_pixel, Address packed, Address bias, Address y) {
                 return WinogradConvolution{images,
                                            height,
                                            width,
                                            channels,
                                            kernels,
                                            columns,
                                            pointer<void>(x),
                                            x_stride_image,
                                            x_stride_row,
                                            x_stride_pixel,
                                            pointer<void>(packed),
                                            pointer<float>(bias),
                                            pointer<void>(y)};
             }),
             py::kw_only(), py::arg("images"), py::arg("height"), py::arg("width"), py::arg("channels"),
             py::arg("kernels"), py::arg("columns"), py::arg("x"), py::arg("x_stride_image"),
             py::arg("x_stride_row"), py::arg("x_stride_pixel"), py::arg("packed"), py::arg("bias"),
             py::arg("y"));
    m.def("winograd_convolution_cpu_runs", &sda::cpu::winograd_convolution_runs);
    m.def("winograd_convolution_cpu_workspace", &sda::cpu::winograd_convolution_workspace,
          py::arg("convolution"), py::arg("threads"));
    m.def(
        "winograd_convolution_cpu",
        [](const WinogradConvolution& convolution, Address workspace, int threads) {
            check(sda::cpu::winograd_convolution(convolution, pointer<void>(workspace), threads));
        },
        py::arg("convolution"), py::arg("workspace"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
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
    bind_guidance(m);
    bind_philox_normal(m);
    bind_reverse_step(m);
    bind_to_uint8(m);
    bind_winograd_convolution(m);
}
