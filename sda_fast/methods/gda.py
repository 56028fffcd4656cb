"""GDA (Tsai et al. 2024), re-implemented from what is known of it and not verified against its numbers.

Known: the paper's abstract and the code its authors published later, whose settings are the defaults here. Not known:
whether these are the paper's, and the numbers any of it should give. docs/methods.md lists what differs from that code.
No label of the test data is ever used.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.samplers import ReverseSteps, q_sample
from sda_fast.errors import SdaError
from sda_fast.execution import check_images
from sda_fast.methods.adaptation import generator, identities_of, resized
from sda_fast.methods.augmix import augmix_parts
from sda_fast.methods.base import Cost, Method, probabilities
from sda_fast.methods.memo import marginal_entropy
from sda_fast.methods.views import random_crops, random_patches
from sda_fast.models.adm import ADM, ResBlock
from sda_fast.ops import philox_normal, reverse_step

# How much each term of the loss counts.
WEIGHTS = {"marginal": 100.0, "pixel": 100.0, "patch": 1000.0, "style": 5000.0, "content": 100.0}
TEMPERATURE = 0.07
PATCHES = {"patch": 256, "style": 32}  # compared in the contrastive term, cut for the style term


class GDA(Method):
    """A few reverse steps from little noise, guided by what classifier and features say; the surer prediction counts.

    adm: unconditional; images are scaled to its size (bilinear) where that differs, and their projections back to the
    images' size, so that both show the same. respacing, start: "50" and 5, from about timestep 82 of 1000; the last
    step is not guided, as its guidance would not reach the x_0 that is returned. views: of AugMix, for the marginal
    entropy. weights: of the terms, see `WEIGHTS`; a term of weight zero is not computed.

    style: from patches [P, 3, 224, 224] in about [-1, 1] to their similarity with the prompt "photo realistic" in
    [-1, 1], [P] (published: CLIP ViT-B/16). content: from an image [1, 3, S, S] in about [-1, 1], S the ADM's size, to
    feature maps (published: VGG-19, conv4_2 and conv5_2). This package ships neither network; without one, its term is
    left out.

    Random numbers depend on `seed` and the image's identity. Raises SdaError for settings out of range.
    """

    title = "GDA"
    revision = 2
    differentiates = True
    needs = ("adm",)
    on_request = True

    def __init__(
        self,
        model: nn.Module,
        adm: ADM,
        style: Callable[[Tensor], Tensor] | None = None,
        content: Callable[[Tensor], Sequence[Tensor]] | None = None,
        respacing: str = "50",
        start: int = 5,
        views: int = 16,
        weights: dict[str, float] | None = None,
        seed: int = 0,
    ):
        super().__init__(model)
        self.schedule = Schedule.linear(respacing)
        if not 1 <= start <= len(self.schedule):
            raise SdaError(f"start={start} is out of range: respacing {respacing!r} has {len(self.schedule)} steps")
        if views < 1:
            raise SdaError(f"views={views} is out of range: give at least 1")
        if adm.num_classes is not None:
            raise SdaError("this ADM is class-conditional; GDA needs an unconditional one")
        if unknown := set(weights or ()) - set(WEIGHTS):
            raise SdaError(f"GDA has no term {min(unknown)!r}; choose from {', '.join(WEIGHTS)}")
        for term, weight in (weights or {}).items():
            if not 0 <= weight < math.inf:
                raise SdaError(f"the weight {weight} of GDA's {term} is out of range: give 0 or more")
        self.adm = adm.eval().requires_grad_(False)
        self.style, self.content = style, content
        self.start, self.views, self.seed = start, views, seed
        self.weights = {**WEIGHTS, **(weights or {})}

    def cost(self) -> Cost:
        guided = self.start - 1
        marginal = self.views * guided * (self.weights["marginal"] > 0)
        # The contrastive term's pass of the image itself goes through the encoder alone.
        encoder = guided * (self.weights["patch"] > 0)
        return Cost(2 + marginal, marginal, self.start + encoder, guided)

    def __call__(
        self, images: Tensor, projected: Tensor | None = None, seeds: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        if projected is None:
            projected = self.project(images, seeds)
        with torch.no_grad():
            return self.scores(images, projected)

    def scores(self, images: Tensor, projected: Tensor) -> Tensor:
        """The prediction of less entropy, image by image; projections are seen at the images' size."""
        projected = resized(projected, images.shape[-1])
        p, q = probabilities(self.model, images), probabilities(self.model, projected)
        surer = torch.special.entr(q).sum(1) < torch.special.entr(p).sum(1)
        return torch.where(surer[:, None], q, p)

    def project(self, images: Tensor, seeds: Sequence[int] | Tensor | None = None) -> Tensor:
        """Images [N, 3, H, W] in [-1, 1] after the guided steps: float32 [N, 3, S, S] in [-1, 1], S the ADM's size."""
        identities, size = identities_of(seeds, len(images)), self.adm.image_size
        with torch.inference_mode(False):
            images = check_images(resized(images.detach().clone(), size), self.adm.in_channels, size)
            results = [self._project(x[None], i) for x, i in zip(images, identities, strict=True)]
        return torch.cat([images[:0], *results])

    def _project(self, reference: Tensor, identity: int) -> Tensor:
        rng = generator(self.seed, identity)
        draw: dict[str, Any] = {"seed": self.seed, "identities": torch.tensor([identity], device=reference.device)}
        noise = philox_normal(reference.shape, step=0, device=reference.device, **draw)
        x = q_sample(self.schedule, self.start - 1, reference, noise)
        steps = ReverseSteps(self.schedule, self.start, x.device)
        *guided, last = steps
        for position in guided:
            coefficients = steps.table.index_select(0, position[:1])[0]
            conditioning = self.adm.conditioning(steps.timesteps(position, x))
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                with outputs_of(feature_blocks(self.adm)) as features:
                    out = self.adm.denoise(leaf, conditioning)
                # x_in = f x_0 + (1 - f) x_t, f = sqrt(1 - abar), by a = sqrt(1 / abar), b = sqrt(1 / abar - 1)
                a, b = coefficients[0], coefficients[1]
                x_in = b / a * predicted_x0(leaf, out, coefficients) + (1 - b / a) * leaf
                loss = self.loss(x_in, features, reference, conditioning, rng)
                (gradient,) = torch.autograd.grad(loss, leaf)
            low, high = coefficients[4], coefficients[5]
            v = out[:, x.shape[1] :]  # of a network that learned no variance: none
            log_variance = low + (v.detach() + 1) / 2 * (high - low) if v.shape[1] else low
            x = reverse_step(x, out.detach(), steps.table, position, clip=False, **draw)
            x = x - log_variance.exp() * gradient  # Dhariwal & Nichol 2021, algorithm 1: the mean moves by Sigma g
        with torch.no_grad():
            out = self.adm(x, steps.timesteps(last, x))
            return predicted_x0(x, out, steps.table.index_select(0, last[:1])[0]).clamp(-1, 1)

    def loss(
        self, x: Tensor, features: Sequence[Tensor], reference: Tensor, conditioning: Tensor, rng: np.random.Generator
    ) -> Tensor:
        """The weighted sum of the terms, a scalar.

        x and reference [1, 3, S, S]; features: the encoder's of x_t, from `feature_blocks`; conditioning: that of x_t.
        """
        terms: dict[str, Callable[[], Tensor]] = {
            "marginal": lambda: self._marginal(x, rng),
            "pixel": lambda: F.mse_loss(x, reference),
            "patch": lambda: self._patch(features, reference, conditioning, rng),
        }
        if (style := self.style) is not None:
            terms["style"] = lambda: (1 - style(random_patches(x, PATCHES["style"], rng))).mean()
        if (content := self.content) is not None:
            pairs = zip(content(x), content(reference), strict=True)
            terms["content"] = lambda: torch.stack([F.mse_loss(new, old) for new, old in pairs]).sum()
        chosen = [self.weights[name] * term() for name, term in terms.items() if self.weights[name]]
        return torch.stack(chosen).sum() if chosen else 0 * x.sum()

    def _marginal(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """The entropy of the mean prediction of AugMix views; Pillow's part of each is a constant to the gradient."""
        views = random_crops(x.clamp(-1, 1), self.views, getattr(self.model, "input_size", x.shape[-1]), rng)
        m, mixtures = (t.to(x) for t in augmix_parts(views, rng))
        return marginal_entropy(self.model(m * views + (1 - m) * mixtures).float())

    def _patch(
        self, features: Sequence[Tensor], reference: Tensor, conditioning: Tensor, rng: np.random.Generator
    ) -> Tensor:
        """Contrastive loss of the encoder's features (Yang et al. 2023): each place like itself, unlike the others."""
        losses = []
        for new, old in zip(features, encoder_features(self.adm, reference, conditioning), strict=True):
            places = new[0, 0].numel()
            chosen = torch.from_numpy(rng.permutation(places)[: PATCHES["patch"]]).to(reference.device)
            new, old = (F.normalize(f.flatten(2)[0, :, chosen], dim=0) for f in (new, old))  # [C, P]
            losses.append(F.cross_entropy(new.T @ old / TEMPERATURE, torch.arange(len(chosen), device=new.device)))
        return torch.stack(losses).mean()


def predicted_x0(x: Tensor, out: Tensor, coefficients: Tensor) -> Tensor:
    """x_0 by the network's output at x [N, C, H, W], of which the first C channels are the noise; not clamped."""
    return coefficients[0] * x - coefficients[1] * out[:, : x.shape[1]]


def feature_blocks(adm: ADM) -> list[nn.Module]:
    """Blocks 10 to 14 of the encoder's 18; of another encoder, those at that depth."""
    depth = len(adm.input_blocks)
    first = round(10 / 18 * depth)
    return list(adm.input_blocks[first : max(first, round(14 / 18 * depth)) + 1])


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What blocks give while the context is open, in float32, in the order in which they run."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda block, inputs, output: found.append(output.float())) for block in blocks
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def encoder_features(adm: ADM, x: Tensor, conditioning: Tensor) -> list[Tensor]:
    """What `feature_blocks` give of x, [N, C, h, w] each, without what comes after them."""
    blocks = feature_blocks(adm)
    sizes = [m.emb_layers[1].out_features for m in adm.modules() if isinstance(m, ResBlock)]
    parts, h = iter(conditioning.split(sizes, dim=1)), x.to(adm.torso_dtype)
    with outputs_of(blocks) as found:
        for block in adm.input_blocks:
            h = block(h, parts)
            if block is blocks[-1]:
                break
    return found
