"""Projections onto the diffusion model's own domain: DDA's guided one (also SDA's) and DiffPure's plain one."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sda_fast.diffusion import LowPass, Schedule
from sda_fast.diffusion.guidance import Guided, Norm, finish, guide_without_jacobian
from sda_fast.diffusion.samplers import Draw, ReverseSteps, q_sample
from sda_fast.engines import Engine, GuidedStep, Precision, Step, UnguidedStep
from sda_fast.engines.runner import Runner, halving
from sda_fast.errors import SdaError
from sda_fast.execution import Batch, Noise, batches, check_images
from sda_fast.models.adm import ADM
from sda_fast.ops import reverse_step


class Projection(Protocol):
    """Images [N, 3, H, W] in [-1, 1] to their projections, the same shape and range up to small excess."""

    def __call__(
        self, images: Tensor, noise: Tensor | None = None, seeds: Sequence[int] | Tensor | None = None
    ) -> Tensor: ...


class _Steps(ReverseSteps):
    """The reverse steps with what the ADM is told at each of them, computed once."""

    def __init__(self, adm: ADM, schedule: Schedule, start: int, device: torch.device):
        super().__init__(schedule, start, device)
        self._conditioning = adm.conditioning(schedule.timestep_map[:start].to(device))

    def conditioning(self, position: Tensor) -> Tensor:
        """The row of `ADM.conditioning` for a step, [1, K]."""
        return self._conditioning.index_select(0, position[:1])

    def coefficients(self, position: Tensor) -> Tensor:
        """The row of `Schedule.step_table`, [1, 8]."""
        return self.table.index_select(0, position[:1])


class _Reverse:
    """What both projections share: noise the images, then take reverse steps in batches of one fixed size."""

    def __init__(
        self,
        adm: ADM,
        step: Step,
        schedule: Schedule,
        start: int,
        noise_index: int,
        engine: str | Engine,
        batch_size: int | None,
        seed: int,
    ):
        if not 1 <= start <= len(schedule):
            raise SdaError(f"start={start} is out of range: respacing {schedule.respacing!r} has {len(schedule)} steps")
        if not 0 <= noise_index < len(schedule):
            raise SdaError(
                f"start={start} is out of range: images are noised at index {noise_index}, "
                f"and the last one of respacing {schedule.respacing!r} is {len(schedule) - 1}"
            )
        if batch_size is not None and batch_size < 1:
            raise SdaError(f"batch_size={batch_size} is out of range: give at least 1")
        if adm.num_classes is not None:
            raise SdaError("this ADM is class-conditional; projections need an unconditional one")
        self.adm = adm
        self.network = Runner(step, engine)
        self.schedule, self.start, self.noise_index = schedule, start, noise_index
        self.batch_size, self.seed = batch_size, seed

    def _step(
        self, steps: _Steps, position: Tensor, batch: Batch, x: Tensor, guide: Tensor | None, draw: Draw
    ) -> Tensor:
        raise NotImplementedError  # the subclasses' one method

    @property
    def batch_unit(self) -> int:
        """What the batch must be a multiple of."""
        return 1

    def _guide(self, images: Tensor) -> Tensor | None:
        """What the steps of a batch look at of its images, computed once."""
        return None

    # As decorators: inside the generator they would hold for the caller between two steps. The guidance differentiates,
    # which inference mode, where callers may be, does not allow.
    @torch.inference_mode(False)
    @torch.no_grad()
    def steps(
        self, images: Tensor, noise: Tensor | None = None, seeds: Sequence[int] | Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield x, float32 [N, 3, H, W], after every reverse step; arguments as `__call__`."""
        images = check_images(images, self.adm.in_channels, self.adm.image_size)
        if images.is_inference():
            images = images.clone()
        source = Noise(images, self.seed, seeds, noise, self.start + 1)
        parts = batches(len(images), self.batch_size)
        if not parts:
            yield images
            return
        xs, guides = [], []
        for part in parts:
            x0 = part.take(images)
            xs.append(q_sample(self.schedule, self.noise_index, x0, source.first(part, x0)))
            guides.append(self._guide(x0))
        steps = _Steps(self.adm, self.schedule, self.start, images.device)
        for k, position in enumerate(steps, 1):
            for j, part in enumerate(parts):
                xs[j] = self._step(steps, position, part, xs[j], guides[j], source.draw(part, k))
            yield torch.cat([x[: part.real] for x, part in zip(xs, parts, strict=True)])

    def __call__(
        self, images: Tensor, noise: Tensor | None = None, seeds: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Project images [N, 3, H, W] in [-1, 1]; returns the same shape, float32.

        seeds: one integer per image, its identity in the counter-based noise (default 0, 1, ...). noise: explicit
        standard normal noise [start + 1, N, 3, H, W] instead; [0] noises the image, [k] is of reverse step k.
        Where memory runs out, `batch_size` is halved, for good, and the images are begun again.
        Raises SdaError for images of another shape, integer or non-finite ones, and noise or seeds that do not fit.
        """
        return halving(self, len(images), lambda: deque(self.steps(images, noise, seeds), maxlen=1).pop())


class Projector(_Reverse):
    """The alignment of SDA and the projection of DDA: noise to index `start`, denoise under low-pass guidance.

    respacing, start (N), factor (D), scale (w): the published "100", 50, 4, 6.0. norm: "image" divides the guidance
    by sqrt(norm_group) times each image's own norm; "batch" by the joint norm of consecutive groups of `norm_group`
    images, as published (10 for SDA, 4 for DDA), where a last group may be smaller. batch_size: how many images a
    network pass takes, the last batch padded; None takes all at once. As published, images are noised at index N
    and the first reverse step is told N - 1.

    jacobian_free: leave out what the guidance's gradient sends back through the network, an approximation at half the
    work (`diffusion.guidance.guide_without_jacobian`).

    The adm is put into eval mode and its weights are frozen, here and for good.

    An image's projection depends on its pixels, its seed, these settings and, in last bits, on batch_size and the
    number of CPU threads. With one thread (`torch.set_num_threads(1)`, as in the stages) it does not depend on the
    images beside it; with several, libraries may round differently from position to position.

    Gao et al. 2023, algorithm 1. Raises SdaError for settings out of range.
    """

    def __init__(
        self,
        adm: ADM,
        respacing: str = "100",
        start: int = 50,
        factor: int = 4,
        scale: float = 6.0,
        norm: Norm = "image",
        norm_group: int = 10,
        engine: str | Engine = "eager",
        precision: Precision = "fp32",
        batch_size: int | None = None,
        seed: int = 0,
        jacobian_free: bool = False,
    ):
        if norm not in ("image", "batch"):
            raise SdaError(f'norm {norm!r} is not known; choose "image" or "batch"')
        if not 0 <= scale < math.inf:
            raise SdaError(f"scale={scale} is out of range: 0 is no guidance, 6 the published strength")
        if norm_group < 1:
            raise SdaError(f"norm_group={norm_group} is out of range: give at least 1")
        if norm == "batch" and batch_size is not None and batch_size % norm_group:
            raise SdaError(
                f'batch_size={batch_size} would cut a norm group of {norm_group}: norm="batch" takes multiples of it'
            )
        self.lowpass = LowPass(adm.image_size, factor)
        step = UnguidedStep(adm, precision) if jacobian_free else GuidedStep(adm, self.lowpass, precision)
        super().__init__(adm, step, Schedule.linear(respacing), start, start, engine, batch_size, seed)
        self.scale, self.norm, self.norm_group, self.jacobian_free = scale, norm, norm_group, jacobian_free

    @property
    def batch_unit(self) -> int:
        return self.norm_group if self.norm == "batch" else 1

    def _guide(self, images: Tensor) -> Tensor:
        return self.lowpass.down(images)

    def _step(
        self, steps: _Steps, position: Tensor, batch: Batch, x: Tensor, guide: Tensor | None, draw: Draw
    ) -> Tensor:
        assert guide is not None
        conditioning = steps.conditioning(position)
        if self.jacobian_free:
            (out,) = self.network(x, conditioning)
            terms = guide_without_jacobian(self.lowpass, x, out, guide, steps.table, position)
        else:
            terms = Guided(*self.network(x, conditioning, steps.coefficients(position), guide))
        return finish(x, terms, steps, position, draw, self.scale, self.norm, self.norm_group, batch.real)


class Purifier(_Reverse):
    """DiffPure's projection by ancestral sampling: noise to step `start` of 1000 (t* = 150), denoise without guidance.

    Nie et al. 2022, equations 2 and 4 in discrete time, x_0 clamped to [-1, 1] at every step. As in the original,
    images are noised at index start - 1, the index the first reverse step is told.
    """

    def __init__(
        self,
        adm: ADM,
        start: int = 150,
        respacing: str = "1000",
        engine: str | Engine = "eager",
        precision: Precision = "fp32",
        batch_size: int | None = None,
        seed: int = 0,
    ):
        step = UnguidedStep(adm, precision)
        super().__init__(adm, step, Schedule.linear(respacing), start, start - 1, engine, batch_size, seed)

    def _step(
        self, steps: _Steps, position: Tensor, batch: Batch, x: Tensor, guide: Tensor | None, draw: Draw
    ) -> Tensor:
        (out,) = self.network(x, steps.conditioning(position))
        return reverse_step(x, out, steps.table, position, clip=True, **draw)
