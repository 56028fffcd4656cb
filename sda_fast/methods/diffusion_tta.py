"""Diffusion-TTA (Prabhudesai et al. 2023): a class-conditional diffusion model tells the classifier how it did."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sda_fast.diffusion import Schedule
from sda_fast.errors import SdaError
from sda_fast.methods.adaptation import (
    Adapting,
    MakeOptimizer,
    batch_norms,
    generator,
    optimizer_for,
    parameters_of,
    resized,
    restore,
    working_copy,
)
from sda_fast.methods.base import Cost
from sda_fast.models.dit import DiT
from sda_fast.models.vae import VAE
from sda_fast.ops import philox_normal

if TYPE_CHECKING:
    from sda_fast.projector import Projection


class DiffusionTTA(Adapting):
    """The DiT is conditioned on the classifier's prediction; both descend its denoising loss on the image.

    dit: of latents with `vae`, of pixels without. It sees the image scaled to its size (bilinear) where that differs.
    The classes of classifier and DiT go by name where both have names, else by position.

    updates, pairs: optimiser steps, and (timestep, noise) pairs that each averages, `batch_size` of them at a time
    (published: 5 of 180, as 20 x 9 or 15 x 12). optimizer: by default as published, SGD 5e-3 with momentum 0.9 for
    networks with batch normalisation (published: ResNet-18, and ViT-B/32) and AdamW 1e-5 without decay for the others
    (ConvNeXt); one for both networks; lr: in place of its rate. adapt_diffusion: False leaves the DiT as it is. online:
    keep weights and optimiser from image to image; a result then depends on the images before it, until `reset()`. All
    parameters are adapted but the class embeddings, as the paper says; the published code leaves out more
    (docs/methods.md).

    Timesteps and noise depend on `seed`, the image's identity and the update. Raises SdaError for settings out of
    range, and for models that do not go together.
    """

    title = "Diffusion-TTA"
    differentiates = True
    needs = ("dit",)

    def __init__(
        self,
        model: nn.Module,
        dit: DiT,
        vae: VAE | None = None,
        projector: "Projection | None" = None,
        updates: int = 5,
        pairs: int = 180,
        batch_size: int = 20,
        optimizer: MakeOptimizer | None = None,
        lr: float | None = None,
        adapt_diffusion: bool = True,
        online: bool = False,
        seed: int = 0,
    ):
        super().__init__(model, projector)
        if updates < 1 or pairs < 1 or batch_size < 1:
            raise SdaError(f"{updates=}, {pairs=}, {batch_size=} are out of range: give at least 1 of each")
        if vae is None and dit.in_channels != 3:
            raise SdaError(
                f"the DiT works on latents of {dit.in_channels} channels: give its VAE, vae=load_vae(FOLDER)"
            )
        self.dit, self.vae = dit, vae
        self.updates, self.pairs, self.batch_size, self.seed = updates, pairs, batch_size, seed
        self.adapt_diffusion, self.per_image = adapt_diffusion, not online
        self.schedule = Schedule.linear()
        # A DiT that stays as it is need not be copied, only be free of gradients.
        self.adapted_dit = working_copy(dit) if adapt_diffusion else dit.eval().requires_grad_(False)
        self.class_embeddings = dit.y_embedder.embedding_table.weight[matching_classes(model, dit)].detach()
        adapted = [self.adapted]
        if adapt_diffusion:  # all of it but the class embeddings and the fixed positions
            parts = self.adapted_dit
            adapted += [parts.x_embedder, parts.t_embedder, parts.blocks, parts.final_layer]
        self._parameters = parameters_of(adapted, "Diffusion-TTA")
        self._make_optimizer = optimizer_for(published_optimizer(self.adapted), optimizer, lr)
        self.optimizer = self._make_optimizer(self._parameters)

    def reset(self) -> None:
        restore(self.adapted, self.model)
        if self.adapt_diffusion:
            restore(self.adapted_dit, self.dit)
        self.optimizer = self._make_optimizer(self._parameters)

    def cost(self) -> Cost:
        pairs = self.updates * self.pairs
        return Cost(self.updates + 1, self.updates, pairs, pairs)

    def adapt(self, images: Tensor, identities: list[int]) -> Tensor:
        x0, rng = self.diffused(images), generator(self.seed, identities[0])
        try:
            for update in range(self.updates):
                timesteps = torch.from_numpy(rng.integers(len(self.schedule), size=self.pairs)).to(x0.device)
                noise = philox_normal(
                    (1, self.pairs, *x0.shape[1:]), seed=self.seed, identities=identities, step=update, device=x0.device
                )
                self.optimizer.zero_grad()
                self.accumulate(images, x0, timesteps, noise[0])
                self.optimizer.step()
            with torch.no_grad():
                return self.adapted(images)
        finally:
            if self.per_image:
                self.reset()

    @torch.no_grad()
    def diffused(self, images: Tensor) -> Tensor:
        """What the DiT sees of images [N, 3, H, W]: the images or the means of their latents, [N, C, S, S]."""
        size = self.dit.input_size
        if self.vae is None:
            return resized(images, size)
        return self.vae.encode(resized(images, size * self.vae.reduction))

    def accumulate(self, image: Tensor, x0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Add the gradients of the loss of P pairs to the parameters'; returns the loss.

        image [1, 3, H, W]; x0 [1, C, S, S]; timesteps int64 [P]; noise [P, C, S, S]. The classifier runs once: the
        gradient for its prediction is summed over the parts, and then sent back through it.
        """
        y = self.adapted(image).float().softmax(dim=1)
        if y.shape[1] != len(self.class_embeddings):
            raise SdaError(
                f"the classifier tells {y.shape[1]} classes apart, the DiT {len(self.class_embeddings)}: "
                "give one with the same"
            )
        context = y @ self.class_embeddings  # [1, hidden]
        leaf = context.detach().requires_grad_()
        total = torch.zeros((), device=x0.device)
        for t, eps in zip(timesteps.split(self.batch_size), noise.split(self.batch_size), strict=True):
            loss = diffusion_loss(self.adapted_dit, self.schedule, x0, leaf, t, eps) * (len(t) / len(timesteps))
            loss.backward()
            total += loss.detach()
        context.backward(leaf.grad)
        return total


def diffusion_loss(
    dit: DiT, schedule: Schedule, x0: Tensor, context: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean over P pairs of ||eps_phi(x_t, t, c) - eps||^2 per element (equation 5), x_t as in `q_sample`.

    x0 [1, C, S, S]; context c [1, hidden], in place of a class embedding; timesteps int64 [P]; noise [P, C, S, S].
    """
    abar = schedule.alphas_cumprod.to(x0.device)[timesteps][:, None, None, None]
    x_t = abar.sqrt().float() * x0 + (1 - abar).sqrt().float() * noise
    c = dit.t_embedder(timesteps) + context
    conditioning = torch.cat([layer.adaLN_modulation(c) for layer in (*dit.blocks, dit.final_layer)], dim=1)
    eps = dit.denoise(x_t, conditioning)[:, : dit.in_channels]
    return F.mse_loss(eps.float(), noise)


def published_optimizer(model: nn.Module) -> MakeOptimizer:
    """Diffusion-TTA's optimiser for the family of a network."""
    if any(batch_norms(model)):
        return partial(torch.optim.SGD, lr=5e-3, momentum=0.9)
    return partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)


def matching_classes(model: nn.Module, dit: DiT) -> list[int]:
    """For each class of a classifier, the DiT's; by name where both have names, else all of them in order.

    Raises SdaError for a class that the DiT does not know, or another number of nameless ones.
    """
    ours: Sequence[str] = getattr(model, "classes", ())
    if not ours or not dit.classes:
        if len(ours) not in (0, dit.num_classes):
            raise SdaError(
                f"the classifier tells {len(ours)} classes apart, the DiT {dit.num_classes}: give one with the same"
            )
        return list(range(dit.num_classes))
    if unknown := [name for name in ours if name not in dit.classes]:
        raise SdaError(f"the DiT does not know the classifier's class {unknown[0]!r}: give one with the same classes")
    return [dit.classes.index(name) for name in ours]
