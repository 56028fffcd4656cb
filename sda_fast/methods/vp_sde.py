"""DiffPure's published purification: the reverse-time variance-preserving SDE, solved by torchsde."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sda_fast.diffusion import Schedule
from sda_fast.diffusion.samplers import q_sample
from sda_fast.engines import Engine, Precision, UnguidedStep
from sda_fast.engines.runner import Runner
from sda_fast.errors import SdaError
from sda_fast.execution import Batch, Noise, batches, check_images
from sda_fast.models.adm import ADM
from sda_fast.ops import philox_normal

BETA_MIN, BETA_MAX = 0.1, 20.0
DT = 1e-3  # torchsde's default step, which the published code takes


class SDEPurifier:
    """Images noised to time t* = start / 1000 and brought back by the reverse SDE in Euler steps of 1e-3.

    Nie et al. 2022, equations 2 and 4, with beta from 0.1 to 20. As published, images are noised with the discrete
    alphas_cumprod[start - 1], the network is told floor(1000 t), x_0 is not clamped, and the integration ends at
    t = 1e-5. `Purifier` is the variant by ancestral sampling and shares arguments and guarantees, but here
    `batch_size` is not halved where memory runs out.

    Raises SdaError without torchsde, and for settings out of range.
    """

    def __init__(
        self,
        adm: ADM,
        start: int = 150,
        engine: str | Engine = "eager",
        precision: Precision = "fp32",
        batch_size: int | None = None,
        seed: int = 0,
    ):
        try:
            import torchsde
        except ImportError as error:
            raise SdaError('DiffPure\'s SDE needs torchsde: pip install "sda-fast[diffpure]"') from error
        self._sdeint = torchsde.sdeint
        if not 1 <= start < 1000:
            raise SdaError(f"start={start} is out of range: t* = start / 1000 lies between 0 and 1; 150 is published")
        if batch_size is not None and batch_size < 1:
            raise SdaError(f"batch_size={batch_size} is out of range: give at least 1")
        if adm.num_classes is not None:
            raise SdaError("this ADM is class-conditional; projections need an unconditional one")
        self.adm = adm
        step = UnguidedStep(adm, precision)
        self.network = Runner(step, engine)
        self.schedule, self.start, self.batch_size, self.seed = Schedule.linear(), start, batch_size, seed

    @torch.no_grad()
    def __call__(
        self, images: Tensor, noise: Tensor | None = None, seeds: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Purify images [N, 3, H, W] in [-1, 1]; returns the same shape, float32.

        noise: standard normal [start + 1, N, 3, H, W], [0] for the noising and [k] for step k; else by `seeds`.
        """
        images = check_images(images, self.adm.in_channels, self.adm.image_size)
        source = Noise(images, self.seed, seeds, noise, self.start + 1)
        purified = [self._purify(part, images, source) for part in batches(len(images), self.batch_size)]
        return torch.cat([images[:0], *purified])

    def _purify(self, part: Batch, images: Tensor, source: Noise) -> Tensor:
        x0 = part.take(images)
        x = q_sample(self.schedule, self.start - 1, x0, source.first(part, x0))
        # torchsde integrates forwards, in s = 1 - t
        s = torch.tensor([1 - self.start / 1000, 1 - 1e-5], device=x.device)
        sde = _ReverseVPSDE(self.network, self.adm, x.shape)
        y = x.flatten(1)
        solution = self._sdeint(sde, y, s, bm=_Increments(source, part, x, y), method="euler", dt=DT)
        return solution[-1].reshape(x.shape)[: part.real]


class _ReverseVPSDE:
    """dx = (beta x / 2 + beta score) ds + sqrt(beta) dw, with score = -eps / sqrt(1 - abar), all at t = 1 - s."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, network: Runner, adm: ADM, shape: torch.Size):
        self.network, self.adm, self.shape = network, adm, shape
        self._x: Any = None
        self._drift: Any = None

    def f(self, s: Tensor, x: Tensor) -> Tensor:
        # torchsde asks for the first drift twice, once to see its shape.
        if x is not self._x:
            self._x, self._drift = x, self._evaluate(1 - s, x)
        return self._drift

    def _evaluate(self, t: Tensor, x: Tensor) -> Tensor:
        (out,) = self.network(x.reshape(self.shape), self.adm.conditioning((1000 * t).long()[None]))
        eps = out[:, : self.shape[1]].flatten(1)
        # abar(t) = exp(-integral of beta)
        abar = torch.exp(-BETA_MIN * t - (BETA_MAX - BETA_MIN) * t.square() / 2)
        return _beta(t) * (x / 2 - eps / (1 - abar).sqrt())

    def g(self, s: Tensor, x: Tensor) -> Tensor:
        return _beta(1 - s).sqrt().expand_as(x)


class _Increments:
    """What torchsde takes for a Brownian motion, asked for one increment after the other; that of step k is the noise
    of reverse step k."""

    levy_area_approximation = "none"

    def __init__(self, source: Noise, part: Batch, x: Tensor, y: Tensor):
        self._source, self._part, self._like, self._step = source, part, x, 0
        self.shape, self.dtype, self.device = y.shape, y.dtype, y.device

    def __call__(self, ta: Tensor, tb: Tensor) -> Tensor:
        self._step += 1
        draw = self._source.draw(self._part, self._step)
        noise = draw["noise"] if "noise" in draw else philox_normal(self._like.shape, step=self._step, **draw)
        return noise.flatten(1) * (tb - ta).sqrt()


def _beta(t: Tensor) -> Tensor:
    return BETA_MIN + (BETA_MAX - BETA_MIN) * t
