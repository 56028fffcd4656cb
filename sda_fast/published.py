"""Checkpoints that others publish and this package reads: where they lie, how large they are, on what terms.

Sizes and checksums are left out where nothing public confirms them. The MD5 sums of OpenAI's files are those its
storage serves them with; mmpretrain's names end in the first eight digits of their SHA-256; the other sums are what
several users of the file have pinned.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from sda_fast.errors import SdaError


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch: its size in bytes and its checksum, "sha256:..." or "md5:...", where known.

    A checksum of fewer digits than its kind has is compared as far as it goes.
    """

    url: str
    size: int | None = None
    checksum: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Published:
    """A checkpoint: what it is, the option that takes it, its publisher's terms; several files form a folder."""

    name: str
    holds: str
    option: str
    terms: str
    files: tuple[RemoteFile, ...]


_OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
_FINETUNED = "https://huggingface.co/lowlevelware/512x512_diffusion_unconditional_ImageNet/resolve/main"
_DIT = "https://dl.fbaipublicfiles.com/DiT/models"
_STABILITY = "https://huggingface.co/stabilityai"
_MM = "https://download.openmmlab.com/mmclassification/v0"

_OPENAI_TERMS = "MIT; its model card: research only"
_DIT_TERMS = "CC BY-NC 4.0"
_MM_TERMS = "Apache-2.0"


def _adm(
    name: str, holds: str, preset: str, size: int | None = None, checksum: str | None = None, url: str = _OPENAI
) -> Published:
    terms = _OPENAI_TERMS if url == _OPENAI else "not stated"
    file = RemoteFile(f"{url}/{name}.pt", size, checksum)
    return Published(name, f"ADM, {holds}", f"--adm FILE --preset {preset}", terms, (file,))


def _dit(name: str, preset: str, size: int | None = None, checksum: str | None = None) -> Published:
    file = RemoteFile(f"{_DIT}/{name}.pt", size, checksum)
    return Published(name, "DiT-XL/2", f"--dit FILE --preset {preset}", _DIT_TERMS, (file,))


def _vae(name: str, weights: str | None = None) -> Published:
    folder = f"{_STABILITY}/{name}/resolve/main"
    files = (
        RemoteFile(f"{folder}/config.json", 547),
        RemoteFile(f"{folder}/diffusion_pytorch_model.safetensors", 334_643_276, weights),
    )
    return Published(name, "VAE of DiT's latents", "load_vae(FOLDER)", "MIT", files)


def _mm(name: str, holds: str, path: str, sha256: str) -> Published:
    file = RemoteFile(f"{_MM}/{path}", checksum=f"sha256:{sha256}")
    return Published(name, holds, "--model FILE", _MM_TERMS, (file,))


_ALL = (
    _adm(
        "64x64_diffusion",
        "64x64, labels, cosine schedule",
        "imagenet64_cond",
        1_183_736_577,
        "sha256:a18558f9a2499615a3ff9759ad12299690ad36ee3378c395adbb94855e2b634f",
    ),
    _adm("128x128_diffusion", "128x128, labels", "imagenet128_cond"),
    _adm(
        "256x256_diffusion",
        "256x256, labels",
        "imagenet256_cond",
        2_215_479_544,
        "md5:d94f30fb1afb2fe821c24bef2043717e",
    ),
    _adm(
        "256x256_diffusion_uncond",
        "256x256 (SDA's and DDA's)",
        "imagenet256",
        2_211_383_297,
        "md5:fd9dd2335b8736d521de0aed54bd90ca",
    ),
    _adm("512x512_diffusion", "512x512, labels", "imagenet512_cond"),
    _adm("512x512_diffusion_uncond_finetune_008100", "512x512, fine-tuned by others", "imagenet512", url=_FINETUNED),
    _dit(
        "DiT-XL-2-256x256",
        "dit-xl-2",
        2_700_611_775,
        "sha256:9ec1876e4c03471bca126663a30e2d1b20610b6d2f87850a39a36f25cc685521",
    ),
    _dit("DiT-XL-2-512x512", "dit-xl-2-512"),
    _vae("sd-vae-ft-ema"),
    _vae("sd-vae-ft-mse", "sha256:a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"),
    _mm("mm-resnet50", "ResNet-50", "resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth", "ea4938fc"),
    _mm(
        "mm-swin-tiny",
        "Swin-T",
        "swin-transformer/swin_tiny_224_b16x64_300e_imagenet_20210616_090925-66df6be6.pth",
        "66df6be60934ef43e368690bf2d7d60b0dad6d945a44e51660551bd452eacc3a",
    ),
    _mm(
        "mm-swin-base",
        "Swin-B (SDA's)",
        "swin-transformer/swin_base_224_b16x64_300e_imagenet_20210616_190742-93230b0d.pth",
        "93230b0d",
    ),
    _mm(
        "ms-swin-base",
        "Swin-B (DDA's, Microsoft's)",
        "swin-transformer/convert/swin_base_patch4_window7_224-4670dd19.pth",
        "4670dd19",
    ),
    _mm(
        "mm-convnext-tiny",
        "ConvNeXt-T (Facebook's)",
        "convnext/convnext-tiny_3rdparty_32xb128_in1k_20220124-18abde00.pth",
        "18abde00",
    ),
    _mm(
        "mm-convnext-base",
        "ConvNeXt-B (Facebook's)",
        "convnext/convnext-base_3rdparty_32xb128_in1k_20220124-d0915162.pth",
        "d0915162",
    ),
)
PUBLISHED: dict[str, Published] = {checkpoint.name: checkpoint for checkpoint in _ALL}


def find_published(name: str) -> Published:
    """The checkpoint of that name. Raises SdaError with the closest names for an unknown one."""
    if name not in PUBLISHED:
        close = get_close_matches(name, PUBLISHED, 3) or list(PUBLISHED)
        raise SdaError(f"no checkpoint is known as {name!r}; known are {', '.join(close)}")
    return PUBLISHED[name]
