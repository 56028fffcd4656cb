"""How the published diffusion models are built: the constructor arguments that their checkpoints do not carry."""

from typing import Any

_ADM_256 = {
    "image_size": 256,
    "model_channels": 256,
    "out_channels": 6,
    "num_res_blocks": 2,
    "attention_resolutions": (8, 16, 32),
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "num_head_channels": 64,
}
_ADM_512 = {
    **_ADM_256,
    "image_size": 512,
    "attention_resolutions": (16, 32, 64),
    "channel_mult": (0.5, 1, 1, 2, 2, 4, 4),
}
# The published models of guided-diffusion (its README gives the flags). imagenet256 also fits its LSUN models, and
# imagenet512 is OpenAI's 512x512 model after others fine-tuned it without labels (512x512_diffusion_uncond_finetune).
ADM_PRESETS: dict[str, dict[str, Any]] = {
    "imagenet64_cond": {
        **_ADM_256,
        "image_size": 64,
        "model_channels": 192,
        "num_res_blocks": 3,
        "attention_resolutions": (2, 4, 8),
        "channel_mult": (1, 2, 3, 4),
        "num_classes": 1000,
        "dropout": 0.1,
        "use_new_attention_order": True,
    },
    "imagenet128_cond": {
        **_ADM_256,
        "image_size": 128,
        "attention_resolutions": (4, 8, 16),
        "channel_mult": (1, 1, 2, 3, 4),
        "num_heads": 4,
        "num_head_channels": -1,
        "num_classes": 1000,
    },
    "imagenet256": _ADM_256,
    "imagenet256_cond": {**_ADM_256, "num_classes": 1000},
    "imagenet512": _ADM_512,
    "imagenet512_cond": {**_ADM_512, "num_classes": 1000},
}
# The noise schedule a model was trained on, where it is not the linear one that all projections here step along.
ADM_SCHEDULES = {"imagenet64_cond": "cosine"}

# The models of the DiT paper's table 1, on the latents of 256x256 images; published are XL/2 at 256 and 512.
DIT_PRESETS: dict[str, dict[str, Any]] = {
    f"dit-{name.lower()}-{patch}": {
        "patch_size": patch,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": heads,
    }
    for name, hidden, depth, heads in (
        ("S", 384, 12, 6),
        ("B", 768, 12, 12),
        ("L", 1024, 24, 16),
        ("XL", 1152, 28, 16),
    )
    for patch in (2, 4, 8)
}
DIT_PRESETS["dit-xl-2-512"] = {**DIT_PRESETS["dit-xl-2"], "input_size": 64}
