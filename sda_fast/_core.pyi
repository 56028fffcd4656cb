"""The compiled operators, on raw addresses. Callers check shapes, dtypes and devices; `sda_fast.ops` does."""

cuda_built: bool
cuda_architectures: str
float32: int
bfloat16: int
float16: int

class ImageLayout:
    """A batch of images seen as [images, outer, inner], strides in elements (csrc/status.h)."""

    def __init__(
        self, images: int, outer: int, inner: int, stride_image: int, stride_outer: int, stride_inner: int
    ) -> None: ...

class ImageStrides:
    """Of a tensor [N, C, H, W], in elements."""

    def __init__(self, image: int, channel: int, row: int, column: int) -> None: ...

class GuidanceTensors:
    """Sizes, addresses and strides as csrc/guidance.h names them; x0 may be 0."""

    def __init__(
        self,
        *,
        images: int,
        channels: int,
        size: int,
        low: int,
        dtype: int,
        interleaved: bool,
        x: int,
        x_strides: ImageStrides,
        out: int,
        out_strides: ImageStrides,
        reference_down: int,
        down: int,
        gram: int,
        table: int,
        steps: int,
        position: int,
        cotangent: int,
        squares: int,
        x0: int,
        x0_strides: ImageStrides,
    ) -> None: ...

def guidance_cpu_workspace(tensors: GuidanceTensors, threads: int) -> int: ...
def guidance_cpu(tensors: GuidanceTensors, workspace: int, threads: int) -> None: ...
def philox_normal_cpu(
    out: int, dtype: int, layout: ImageLayout, seed: int, identities: int, step: int, threads: int
) -> None: ...
def philox_words_cpu(
    out: int, images: int, blocks: int, first_block: int, seed: int, identities: int, step: int
) -> None: ...
def box_muller_cpu(out: int, words: int, pairs: int) -> None: ...

class Pixels:
    """Images [N, channels, pixels] of a tensor, strides in elements; absent where data is 0 (csrc/pixels.h)."""

    def __init__(self, data: int, stride_image: int, stride_channel: int, stride_pixel: int) -> None: ...

class ReverseStep:
    """What a reverse step reads and writes (csrc/reverse_step.h)."""

    def __init__(
        self,
        *,
        images: int,
        channels: int,
        pixels: int,
        dtype: int,
        through_network_dtype: int,
        learned: bool,
        clip: bool,
        x: Pixels,
        out: Pixels,
        noise: Pixels,
        cotangent: Pixels,
        through_network: Pixels,
        result: Pixels,
        table: int,
        position: int,
        identities: int,
        squares: int,
        steps: int,
        seed: int,
        scale: float,
        joint: bool,
        norm_group: int,
        real: int,
    ) -> None: ...

class NormLayout:
    """A batch seen as [images, channels, spatial], strides in elements (csrc/cpu/group_norm_silu.h)."""

    def __init__(
        self, images: int, channels: int, spatial: int, stride_image: int, stride_channel: int, stride_spatial: int
    ) -> None: ...

class NormParameters:
    """Addresses of float32 vectors, of which scale and shift may be 0 (csrc/cpu/group_norm_silu.h)."""

    def __init__(
        self,
        weight: int,
        bias: int,
        scale: int,
        shift: int,
        stride_scale: int,
        stride_shift: int,
        groups: int,
        silu: bool,
    ) -> None: ...

def group_norm_silu_cpu_workspace(where: NormLayout, threads: int) -> int: ...
def group_norm_silu_cpu(
    x: int,
    y: int,
    mean: int,
    rstd: int,
    dtype: int,
    where_x: NormLayout,
    where_y: NormLayout,
    parameters: NormParameters,
    eps: float,
    workspace: int,
    threads: int,
) -> None: ...
def group_norm_silu_backward_cpu(
    dy: int,
    x: int,
    dx: int,
    mean: int,
    rstd: int,
    dtype: int,
    where_dy: NormLayout,
    where_x: NormLayout,
    where_dx: NormLayout,
    parameters: NormParameters,
    workspace: int,
    threads: int,
) -> None: ...
def reverse_step_cpu(step: ReverseStep, threads: int) -> None: ...
def to_uint8_cpu(
    out: int, x: Pixels, dtype: int, images: int, channels: int, pixels: int, truncate: bool, threads: int
) -> None: ...

class WinogradConvolution:
    """Sizes, addresses and strides as csrc/cpu/winograd_convolution.h names them; bias may be 0."""

    def __init__(
        self,
        *,
        images: int,
        height: int,
        width: int,
        channels: int,
        kernels: int,
        columns: int,
        x: int,
        x_stride_image: int,
        x_stride_row: int,
        x_stride_pixel: int,
        packed: int,
        bias: int,
        y: int,
    ) -> None: ...

def winograd_convolution_cpu_runs() -> bool: ...
def winograd_convolution_cpu_workspace(convolution: WinogradConvolution, threads: int) -> int: ...
def winograd_convolution_cpu(convolution: WinogradConvolution, workspace: int, threads: int) -> None: ...

# The entry points on CUDA devices exist only where cuda_built is true.
def guidance_cuda_workspace(tensors: GuidanceTensors) -> int: ...
def guidance_cuda(tensors: GuidanceTensors, workspace: int, stream: int) -> None: ...
def philox_normal_cuda(
    out: int, dtype: int, layout: ImageLayout, seed: int, identities: int, step: int, stream: int
) -> None: ...
def philox_words_cuda(
    out: int, images: int, blocks: int, first_block: int, seed: int, identities: int, step: int, stream: int
) -> None: ...
def reverse_step_cuda(step: ReverseStep, stream: int) -> None: ...
