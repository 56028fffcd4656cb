"""Training of the testbed's models: a small ADM, a small DiT in pixel space, and two source classifiers.

Only training patches are used. `sda-fast train-photos` runs all four one after the other; each leaves a
checkpoint and a JSON file with its curve, settings and time.
"""

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sda_fast.data.quantize import to_unit
from sda_fast.diffusion.losses import hybrid_loss
from sda_fast.diffusion.schedule import Schedule
from sda_fast.errors import SdaError
from sda_fast.files import write_json
from sda_fast.models import ADM, DiT, create_classifier, save_checkpoint
from sda_fast.photos.dataset import CLASSES, SIZE, training_batch

ADM_CONFIG: dict[str, Any] = {
    "image_size": SIZE,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [4, 8],
    "channel_mult": [1, 1, 2, 2],
    "num_head_channels": 32,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
DIT_CONFIG: dict[str, Any] = {
    "input_size": SIZE,
    "patch_size": 4,
    "in_channels": 3,
    "hidden_size": 144,
    "depth": 6,
    "num_heads": 3,
    "num_classes": len(CLASSES),
    "learn_sigma": True,
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "resnet": {
        "architecture": "resnet18",
        "options": {
            "layers": [1, 1, 1, 1],
            "channels": [32, 48, 64, 96],
            "stem_type": "deep",
            "stem_width": 16,
        },
    },
    "convnext": {
        "architecture": "convnext_atto",
        "options": {"depths": [1, 1, 2, 1], "dims": [32, 48, 64, 96], "patch_size": 2},
    },
}
LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, images in [-1, 1], labels -> loss
MODELS = ("adm", "dit", *CLASSIFIERS)
STEPS = {"adm": 4000, "dit": 8000, "resnet": 3000, "convnext": 3000}
# AdamW's peak rate; Muon takes over the matrices of the DiT's blocks, where it learns faster (Jordan et al. 2024).
RECIPES: dict[str, dict[str, Any]] = {
    "adm": {"peak": 1e-3, "weight_decay": 0.0, "ema_decay": 0.998},
    "dit": {"peak": 1e-3, "muon_peak": 2e-3, "weight_decay": 0.0, "ema_decay": 0.999, "min_snr": 5.0},
    "classifier": {"peak": 2e-3, "weight_decay": 0.05, "ema_decay": 0.99},
}
LABEL_SMOOTHING = 0.1  # in source training and in fine-tuning alike, else the more confident model rules the sum


def _batches(seed: int, n: int) -> Callable[[], tuple[Tensor, Tensor]]:
    rng = np.random.Generator(np.random.PCG64(seed))

    def draw() -> tuple[Tensor, Tensor]:
        patches, labels = training_batch(rng, n)
        return to_unit(patches), torch.from_numpy(labels)

    return draw


def _learning_rate(step: int, steps: int) -> float:
    """As a fraction of the peak."""
    warmup = min(200, steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _optimizers(
    model: nn.Module, peak: float, muon_peak: float | None, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or, given `muon_peak`, Muon for the matrices of `blocks` and AdamW for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if muon_peak is not None and name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=peak, weight_decay=weight_decay)]
    if muon_peak is not None:
        muon = torch.optim.Muon(matrices, muon_peak, weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def _fit(
    model: nn.Module,
    loss_of: LossOf,
    *,
    steps: int,
    batch: int,
    peak: float,
    weight_decay: float,
    ema_decay: float,
    seed: int,
    log: Callable[[str], None],
    muon_peak: float | None = None,
) -> tuple[nn.Module, list[list[float]]]:
    """Warm-up and cosine decay in bf16 autocast; returns the moving average of the weights and the curve."""
    draw = _batches(seed, batch)
    device = next(model.parameters()).device
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = _optimizers(model, peak, muon_peak, weight_decay)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    curve, running, started = [], 0.0, time.monotonic()
    for step in range(steps):
        for group, highest in groups:
            group["lr"] = highest * _learning_rate(step, steps)
        x, labels = (t.to(device) for t in draw())
        # On the CPU the fused attention's backward is slower than plain products for so few tokens.
        plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
        with plain, torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, x, labels)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for averaged, current in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if averaged.is_floating_point():
                    averaged.lerp_(current, 1 - decay)
                else:
                    averaged.copy_(current)
        running += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            count = (step % 100) + 1
            curve.append([step + 1, round(running / count, 5)])
            rate = (step + 1) / (time.monotonic() - started)
            log(f"step {step + 1}/{steps}  loss {running / count:.4f}  {rate:.2f} steps/s")
            running = 0.0
    return average, curve


def _diffusion_loss(schedule: Schedule, conditional: bool, generator: torch.Generator, min_snr: float | None) -> LossOf:
    scale = schedule.alphas_cumprod.sqrt().float()
    sigma = (1 - schedule.alphas_cumprod).sqrt().float()

    def loss_of(model: nn.Module, x0: Tensor, labels: Tensor) -> Tensor:
        index = torch.randint(len(schedule), (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        a, s = (t[index].to(x0)[:, None, None, None] for t in (scale, sigma))
        x_t = a * x0 + s * noise
        timesteps = schedule.timestep_map[index].to(x0.device)
        out = model(x_t, timesteps, labels) if conditional else model(x_t, timesteps)
        with torch.autocast(x0.device.type, enabled=False):
            return hybrid_loss(out, x0, x_t, noise, index.to(x0.device), schedule, min_snr).mean()

    return loss_of


def _classification_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    # Shifts by up to four pixels: the patch stays what it is, the border is reflected.
    dy, dx = torch.randint(9, (2,)).tolist()
    padded = nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")
    x = padded[..., dy : dy + x.shape[-2], dx : dx + x.shape[-1]]
    return nn.functional.cross_entropy(model(x).float(), labels, label_smoothing=LABEL_SMOOTHING)


def train_model(
    name: str,
    output: Path,
    *,
    steps: int,
    batch: int = 64,
    seed: int = 0,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> Path:
    """Train one of `MODELS` and write `<output>/<name>.safetensors` (float16) and `<name>.json`; returns the former."""
    if steps < 1:
        raise SdaError(f"--steps {steps} is out of range: give at least 1")
    try:
        output.mkdir(parents=True, exist_ok=True)  # now, not after the training
    except OSError as error:
        raise SdaError(f"--output {output} cannot be used ({error.strerror}): choose another one") from error
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    if name in ("adm", "dit"):
        config = ADM_CONFIG if name == "adm" else DIT_CONFIG
        model: nn.Module = ADM(**config) if name == "adm" else DiT(**config)
        recipe = dict(RECIPES[name])
        loss_of = _diffusion_loss(Schedule.linear(), name == "dit", generator, recipe.get("min_snr"))
        metadata: dict[str, Any] = {"kind": name, "config": config}
    else:
        config = {**CLASSIFIERS[name], "classes": list(CLASSES), "input_size": SIZE}
        model = create_classifier(**config)
        recipe = dict(RECIPES["classifier"])
        loss_of = _classification_loss
        metadata = {"kind": "classifier", "config": config}
    started = time.monotonic()
    trained, curve = _fit(
        model.to(device),
        loss_of,
        steps=steps,
        batch=batch,
        seed=seed,
        log=lambda line: log(f"{name}: {line}"),
        **{key: value for key, value in recipe.items() if key != "min_snr"},
    )
    if name == "dit":
        metadata["classes"] = list(CLASSES)
    path = save_checkpoint(output / f"{name}.safetensors", trained.cpu(), metadata, dtype=torch.float16)
    record = {
        "model": name,
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "device": device,
        "recipe": recipe,
        "parameters": sum(p.numel() for p in trained.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "torch": torch.__version__,
        "loss_every_100_steps": curve,
    }
    write_json(record, path.with_suffix(".json"))
    return path
