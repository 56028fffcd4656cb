"""What the tests of methods share: the network of the reference files, and how far numbers are from theirs."""

import pytest
from torch import nn


@pytest.fixture(scope="session")
def reference_network():
    """reference_network(state): the classifier of the files "tent", "memo" and "diffusion_tta", in eval mode."""

    def build(state):
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        network.load_state_dict(state)
        return network.eval()

    return build


@pytest.fixture(scope="session")
def relative():
    """relative(found, expected): the largest error over the largest value."""
    return lambda found, expected: ((found - expected).abs().max() / expected.abs().max()).item()
