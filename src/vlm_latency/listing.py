"""What there is to choose from, in words: the models of the zoo and every parameter."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from vlm_latency.errors import ModelError
from vlm_latency.experiments import EXPERIMENTS
from vlm_latency.option_types import Group
from vlm_latency.options import PRESETS, ModelOptions, Options

GIB = 2**30
OVERRIDES = ("measurement", "flops")  # shared groups that an experiment may override


def models(zoo_file: str | None = None) -> Iterator[tuple[str, str, str, str, str]]:
    """List the zoo: name, parameters, GiB in bfloat16, whether it fits here, its weights.

    Sizes are of the model as it is built here; nothing is loaded.
    """
    from vlm_latency.models import ModelHandle
    from vlm_latency.models.zoo import load_zoo

    for name, entry in load_zoo(zoo_file).models.items():
        handle = ModelHandle(ModelOptions(name=name, dtype="bfloat16", zoo_file=zoo_file))
        size = handle.architecture.weight_bytes("bfloat16")
        try:
            handle.check_fits()
            fits = "yes"
        except ModelError:
            fits = "no"
        published = f"random; published as model.name={entry.hub_id}" if entry.hub_id else "random"
        yield name, _count(size // 2), f"{size / GIB:.2f}", fits, published


def options(settings: Options, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """List parameters: name, values, default, meaning.

    Parameters
    ----------
    settings
        Whose values are the defaults.
    prefix
        Of the names to list, such as ``exp4``; by default all.
    """
    for name, field, value in _walk(type(settings), settings):
        if not prefix or f"{name}.".startswith(f"{prefix.removesuffix('.')}."):
            default = _by_protocol(name) if value is None else None
            yield name, _values(field), default or _written(value), field.description or ""


def _by_protocol(name: str) -> str | None:
    """Say what the protocols set where the user says nothing."""
    group, _, field = name.rpartition(".")
    said = {
        protocol: preset.get(group.rpartition(".")[2], {}).get(field)
        for protocol, preset in PRESETS.items()
    }
    if all(value is None for value in said.values()):
        return None
    return ", ".join(f"{_written(value)} (protocol={name})" for name, value in said.items())


def _walk(group: type[Group], values: Any, path: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    plain = values.model_dump(mode="json")
    for name, field in group.model_fields.items():
        value = getattr(values, name)
        if isinstance(value, Group):
            if not (path.removesuffix(".") in EXPERIMENTS and name in OVERRIDES):
                yield from _walk(type(value), value, f"{path}{name}.")
        else:
            yield f"{path}{name}", field, plain[name]


def _values(field: FieldInfo) -> str:
    found = _kind(field.annotation)
    bounds = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(limit, name, None) is not None
    ]
    return " ".join([found, *bounds])


def _kind(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, inside))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_kind(each) for each in inside if each is not type(None)))
    if origin is Annotated:
        return _kind(inside[0])
    if origin is tuple:
        listed = inside[-1] is Ellipsis
        return f"'{_kind(inside[0])} …'" if listed else "x".join("N" * len(inside))
    return {int: "number", float: "number", bool: "true | false", str: "text"}.get(kind, "text")


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(_written, value))
    return str(value)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e8 else f"{number / 1e6:.2f} M"
