"""Fixtures for all tests: the reference numbers in tests/data (their README says where they come from)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data"

Reference = tuple[dict[str, Tensor], dict[str, Any]]


def _load_reference(name: str) -> Reference:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.offset_keys()}, json.loads(file.metadata()["json"])


@pytest.fixture(scope="session")
def load_reference() -> Callable[[str], Reference]:
    """load_reference(name) -> (tensors by name, configuration) of tests/data/<name>.safetensors."""
    return _load_reference


@pytest.fixture(scope="session")
def load_weights() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """load_weights(tensors) -> the state dict in a reference file, float32, original keys."""

    def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = "weights/"
        return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}

    return weights
