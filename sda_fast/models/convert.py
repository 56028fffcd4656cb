"""State dicts of other libraries, renamed and rearranged to the keys of the modules here and in timm.

Every function takes a mapping of names to tensors and returns a new one; values are views of the given tensors where
nothing has to be rearranged. Keys it does not know are passed on, for the loader to name.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]


def _renamed(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> State:
    """The state with the first rule (regular expression at the start of a key, replacement) that fits each key."""
    result = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            new, found = re.subn(rf"^{pattern}", replacement, key)
            if found:
                key = new
                break
        result[key] = tensor
    return result


class _Sign(NamedTuple):
    """A key that tells a kind of model; `family` of the classifiers that are converted, `mm` for OpenMMLab's layout."""

    key: str
    kind: str
    family: str = ""
    mm: bool = False


_SIGNS = (
    _Sign("input_blocks.0.0.weight", "an ADM"),
    _Sign("blocks.0.adaLN_modulation.1.weight", "a DiT"),
    _Sign("transformer_blocks.0.norm1.linear.weight", "a diffusers DiT"),
    _Sign("decoder.conv_in.weight", "a diffusers VAE"),
    _Sign("down_blocks.0.resnets.0.conv1.weight", "a diffusers UNet"),
    _Sign("backbone.layer1.0.conv1.weight", "an mmpretrain ResNet", "ResNet", mm=True),
    _Sign("backbone.stages.0.blocks.0.attn.w_msa.qkv.weight", "an mmpretrain Swin", "Swin", mm=True),
    _Sign("backbone.stages.0.0.depthwise_conv.weight", "an mmpretrain ConvNeXt", "ConvNeXt", mm=True),
    _Sign("layer1.0.conv1.weight", "a ResNet", "ResNet"),
    _Sign("layers.0.blocks.0.attn.qkv.weight", "a Swin", "Swin"),
    _Sign("stages.0.blocks.0.conv_dw.weight", "a ConvNeXt", "ConvNeXt"),
)


def _sign(state: Mapping[str, Tensor]) -> _Sign | None:
    return next((sign for sign in _SIGNS if sign.key in state), None)


def looks_like(state: Mapping[str, Tensor]) -> str:
    """What kind of model a state dict seems to hold, by its keys, with its article: "an ADM", "a diffusers VAE"..."""
    if sign := _sign(state):
        if sign.kind == "an ADM" and not any(name.startswith("output_blocks.") for name in state):
            return "a noise-aware classifier of guided-diffusion"
        return sign.kind
    if any(name.startswith("backbone.") for name in state):
        return "another mmpretrain model"
    classifier = ("model.", "fc.", "head.", "stem", "classifier.")
    return "a classifier" if any(name.startswith(classifier) for name in state) else "nothing known here"


# The paper's classifiers by family, inputs of the head and blocks of the third stage.
_ARCHITECTURES = {
    ("ResNet", 2048, 6): "resnet50",
    ("Swin", 768, 6): "swin_tiny_patch4_window7_224",
    ("Swin", 1024, 18): "swin_base_patch4_window7_224",
    ("ConvNeXt", 768, 9): "convnext_tiny",
    ("ConvNeXt", 1024, 27): "convnext_base",
}
ARCHITECTURES = tuple(_ARCHITECTURES.values())
_THIRD_STAGE = {
    "ResNet": r"layer3\.(\d+)\.",
    "Swin": r"layers\.2\.blocks\.(\d+)\.",
    "ConvNeXt": r"stages\.2\.blocks\.(\d+)\.",
}


def architecture_of(state: Mapping[str, Tensor]) -> str | None:
    """The timm name of the model that a state dict with timm's keys holds, if it is one of `ARCHITECTURES`."""
    sign, head = _sign(state), classifier_head(state)
    if sign is None or not sign.family or head is None:
        return None
    family = sign.family
    blocks = {match[1] for key in state if (match := re.match(_THIRD_STAGE[family], key))}
    return _ARCHITECTURES.get((family, head.shape[1], len(blocks)))


def classifier_head(state: Mapping[str, Tensor]) -> Tensor | None:
    """The weight [classes, features] of the last layer of a classifier with timm's keys; None if there is none."""
    for key in ("fc.weight", "head.fc.weight", "head.weight", "classifier.weight"):
        if key in state and state[key].ndim == 2:
            return state[key]
    return None


def timm_from_mm(state: Mapping[str, Tensor]) -> State:
    """A classifier of mmpretrain or mmcls (ResNet, Swin or ConvNeXt) with timm's keys; others come back as they are."""
    sign = _sign(state)
    if sign is None or not sign.mm:
        return dict(state)
    return {"ResNet": _resnet, "Swin": _swin, "ConvNeXt": _convnext}[sign.family](state)


def _resnet(state: Mapping[str, Tensor]) -> State:
    return _renamed(state, [(r"backbone\.", ""), (r"head\.fc\.", "fc.")])


def _convnext(state: Mapping[str, Tensor]) -> State:
    block = r"backbone\.stages\.(\d+)\.(\d+)\."
    rules = [
        (r"backbone\.downsample_layers\.0\.", "stem."),
        (r"backbone\.downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (rf"{block}depthwise_conv\.", r"stages.\1.blocks.\2.conv_dw."),
        (rf"{block}pointwise_conv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
        (block, r"stages.\1.blocks.\2."),
        (r"backbone\.norm3\.", "head.norm."),
    ]
    # Its pointwise convolutions are linear layers, unless configured as convolutions.
    return {key: t.flatten(1) if ".mlp.fc" in key and t.ndim == 4 else t for key, t in _renamed(state, rules).items()}


def _swin(state: Mapping[str, Tensor]) -> State:
    block = r"backbone\.stages\.(\d+)\.blocks\.(\d+)\."
    # timm counts the reduction between two stages to the second of them.
    result = {
        re.sub(r"^backbone\.stages\.(\d)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", key): tensor
        for key, tensor in state.items()
        if not key.endswith((".relative_position_index", ".attn_mask"))  # both computed
    }
    for key, tensor in result.items():
        if ".downsample." in key:
            result[key] = _merged_patches(tensor)
    rules = [
        (r"backbone\.patch_embed\.projection\.", "patch_embed.proj."),
        (rf"{block}attn\.w_msa\.", r"layers.\1.blocks.\2.attn."),
        (rf"{block}ffn\.layers\.0\.0\.", r"layers.\1.blocks.\2.mlp.fc1."),
        (rf"{block}ffn\.layers\.1\.", r"layers.\1.blocks.\2.mlp.fc2."),
        (block, r"layers.\1.blocks.\2."),
        (r"backbone\.norm3?\.", "norm."),  # without the 3 before mmcls 0.19
        (r"backbone\.", ""),
    ]
    return _renamed(result, rules)


def _merged_patches(tensor: Tensor) -> Tensor:
    """The last axis of a patch merging in timm's order: mm counts channel, row, column; timm column, row, channel."""
    *outputs, features = tensor.shape
    if features % 4:
        return tensor
    return tensor.reshape(*outputs, features // 4, 2, 2).transpose(-1, -3).reshape(*outputs, features)


def dit_config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DiT` in the config.json of a DiTTransformer2DModel.

    Raises KeyError where one is missing, ValueError for another activation than the original's.
    """
    if (activation := config.get("activation_fn", "gelu-approximate")) != "gelu-approximate":
        raise ValueError(f"its activation is {activation}")
    heads, channels = config["num_attention_heads"], config["in_channels"]
    return {
        "input_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "hidden_size": heads * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": heads,
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": (config.get("out_channels") or channels) == 2 * channels,
    }


def dit_from_diffusers(state: Mapping[str, Tensor], depth: int) -> State:
    """A DiTTransformer2DModel with the keys of `DiT`, positions aside, which diffusers computes.

    diffusers gives every block a copy of the embedders. Raises ValueError if they differ: `DiT` has one for all.
    """
    embedders = r"transformer_blocks\.0\.norm1\.emb\."
    block = r"transformer_blocks\.(\d+)\."
    rules = [
        (r"pos_embed\.proj\.", "x_embedder.proj."),
        (rf"{embedders}timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (rf"{embedders}timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (rf"{embedders}class_embedder\.", "y_embedder."),
        (rf"{block}norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
        (rf"{block}attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
        (rf"{block}ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
        (rf"{block}ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
        (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
        (r"proj_out_2\.", "final_layer.linear."),
    ]
    single = {}
    for key, tensor in state.items():
        first = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", key)
        if first == key or first not in state:
            single[key] = tensor
        elif not torch.equal(tensor, state[first]):
            raise ValueError(f"{key} is not equal to {first}")
    result = _renamed(single, rules)
    for i in range(depth):
        for part in ("weight", "bias"):
            keys = [f"transformer_blocks.{i}.attn1.to_{name}.{part}" for name in "qkv"]
            if all(key in result for key in keys):
                result[f"blocks.{i}.attn.qkv.{part}"] = torch.cat([result.pop(key) for key in keys])
    return result


def vae_with_current_keys(state: Mapping[str, Tensor]) -> State:
    """An AutoencoderKL whose attention has the names of diffusers before 0.17, as Stability's files have."""
    attention = r"(.*\.mid_block\.attentions\.\d+\.)"
    rules = [
        (rf"{attention}query\.", r"\1to_q."),
        (rf"{attention}key\.", r"\1to_k."),
        (rf"{attention}value\.", r"\1to_v."),
        (rf"{attention}proj_attn\.", r"\1to_out.0."),
    ]
    return _renamed(state, rules)
