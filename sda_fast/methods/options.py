"""Settings of methods as a command line or a TOML file gives them: METHOD.NAME=VALUE."""

import json
from collections.abc import Iterable
from typing import Any

from sda_fast.errors import SdaError


def parse_options(items: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By method and name, each value as JSON where it is that, else as text. Raises SdaError for another form."""
    options: dict[str, dict[str, Any]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        method, dot, name = key.partition(".")
        if not (equals and dot and method and name):
            raise SdaError(f"--option {item} is not of the form METHOD.NAME=VALUE, such as memo.views=16")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        options.setdefault(method, {})[name] = value
    return options
