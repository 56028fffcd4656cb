"""A classifier on an engine, to be called like the module it was made from."""

import torch
from torch import Tensor, nn

from sda_fast.engines.runner import Runner
from sda_fast.engines.steps import ClassifierStep, Precision


class EngineClassifier(nn.Module):
    """Images [N, 3, size, size] in [-1, 1] to logits [N, K], float32, in batches of one size, the last one padded.

    It has no gradient. Raises SdaError for an engine or a precision that is not known.
    """

    def __init__(self, model: nn.Module, size: int, engine: str, precision: Precision, batch_size: int):
        super().__init__()
        self._run, self._batch_size = Runner(ClassifierStep(model, size, precision), engine), batch_size

    def check(self, device: str) -> None:
        """Raises SdaError for an engine that cannot run the classifier there."""
        self._run.engine.check(self._run.step, torch.device(device))

    def forward(self, images: Tensor) -> Tensor:
        logits = []
        for part in images.split(self._batch_size):
            missing = self._batch_size - len(part)
            padded = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
            logits.append(self._run(padded)[0][: len(part)].clone())  # the next run may overwrite its outputs
        return torch.cat(logits)
