"""Plain values, as TOML files and the command line give them, checked against the types that settings have."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sda_fast.errors import SdaError

_SINGLE = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_SEVERAL = {str: "texts", int: "whole numbers", float: "numbers", bool: "true and false", dict: "tables"}


def checked(key: str, value: Any, hint: Any, where: str) -> Any:
    """The value if it is of the type `hint`, lists made tuples and whole numbers floats where that asks for them.

    hint: text, number, truth value, None, Literal, tuple or dict of these, or a union. Raises SdaError that names
    `where` and the key for another value, and for a type that no plain value has, such as a network.
    """
    try:
        return _converted(value, hint)
    except TypeError:
        pass
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [str(choice) for option in options if get_origin(option) is Literal for choice in get_args(option)]
    kinds = [option for option in options if option is not NoneType and get_origin(option) is not Literal]
    names = " or ".join(name for kind in kinds if (name := _name(kind)))
    if choices:
        other = f" or give {names}" if names else ""
        raise SdaError(f"{where}: {key} = {value!r} is not known; choose from {', '.join(choices)}{other}")
    if not names:
        raise SdaError(f"{where}: {key} cannot be given here, only from Python: leave it out")
    raise SdaError(f"{where}: {key} = {value!r} is of another type; give {names}")


def _converted(value: Any, kind: Any) -> Any:
    """Raises TypeError if that cannot be."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        for option in arguments:
            try:
                return _converted(value, option)
            except TypeError:
                continue
    elif origin is Literal and any(value == choice and type(value) is type(choice) for choice in arguments):
        return value
    elif origin is tuple and type(value) in (list, tuple):
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return tuple(map(_converted, value, kinds))
    elif origin is dict and type(value) is dict:
        return {key: _converted(each, arguments[1]) for key, each in value.items()}
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif kind is Any or (kind in (str, int, bool, NoneType) and type(value) is kind):
        return value
    raise TypeError


def _name(kind: Any) -> str:
    """What a TOML file calls the type; "" for one that no plain value has."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is dict:
        return f"a table of {_SEVERAL[get_origin(arguments[1]) or arguments[1]]}"
    if origin is tuple:
        number = "" if arguments[1:] == (...,) else f"{len(arguments)} "
        return f"a list of {number}{_SEVERAL[arguments[0]]}"
    return _SINGLE.get(kind, "")
