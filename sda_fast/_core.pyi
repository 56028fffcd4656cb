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

def philox_normal_cpu(
    out: int, dtype: int, layout: ImageLayout, seed: int, identities: int, step: int, threads: int
) -> None: ...
def philox_words_cpu(
    out: int, images: int, blocks: int, first_block: int, seed: int, identities: int, step: int
) -> None: ...
def box_muller_cpu(out: int, words: int, pairs: int) -> None: ...

# The entry points on CUDA devices exist only where cuda_built is true.
def philox_normal_cuda(
    out: int, dtype: int, layout: ImageLayout, seed: int, identities: int, step: int, stream: int
) -> None: ...
def philox_words_cuda(
    out: int, images: int, blocks: int, first_block: int, seed: int, identities: int, step: int, stream: int
) -> None: ...
