"""What groups of parameters are made of: their base class and the values that need parsing."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, create_model

# Marks a field that the protocol settles where the user leaves it open (``None``, the default).
BY_PROTOCOL: Final = "as the protocol says"

OUTPUT_RULES = ("natural", "answer", "none")  # of how much is written, where it is not a number


class Group(BaseModel):
    """A group of parameters: unknown names are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SamplingOptions(Group):
    """``expN.sampling.*``: which requests an experiment makes."""

    requests: str | None = Field(
        None, description="a table of requests made before (parquet), instead of drawing"
    )
    seed: int = Field(0, description="of the choice of requests")


G = TypeVar("G", bound=Group)


def asked(settled: type[G]) -> type[G]:
    """Give the group as users write it: what the protocol settles may be left open."""
    fields: dict[str, Any] = {}
    for name, field in settled.model_fields.items():
        if BY_PROTOCOL in field.metadata:
            kind: Any = Annotated[(field.annotation, *field.metadata)]  # type: ignore[valid-type]
            fields[name] = (kind | None, Field(None, description=field.description))
    return create_model(settled.__name__, __base__=settled, __doc__=settled.__doc__, **fields)


def _words(value: Any) -> Any:
    """Lists do not parse on Kedro's command line: take ``"8 16 32"`` as well, and one number."""
    if isinstance(value, str):
        return value.replace(",", " ").split()
    return [value] if isinstance(value, int | float) else value


def output_length(value: Any) -> str:
    """Check a rule of how much is written.

    >>> output_length("natural"), output_length(8)
    ('natural', '8')

    Raises
    ------
    ValueError
        For anything but one of `OUTPUT_RULES` and a positive number.
    """
    text = str(value)
    if text in OUTPUT_RULES or re.fullmatch("[1-9][0-9]*", text):
        return text
    raise ValueError(f"expected {', '.join(OUTPUT_RULES)} or a positive number")


def _product(value: Any, expected: str) -> Any:
    """Read "2x3" once, as two numbers."""
    if value is None or isinstance(value, list | tuple):
        return value
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", str(value))
    if not match:
        raise ValueError(f"expected {expected}")
    return int(match[1]), int(match[2])


def _tiling(value: Any) -> Any:
    return _product(value, "rows x columns, such as 2x3")


def _size(value: Any) -> Any:
    return _product(value, "width x height, such as 640x480")


def _tiling_or_none(value: Any) -> Any:
    try:
        return None if value == "none" else _tiling(value)
    except ValueError as error:
        raise ValueError(f"{error}, or none") from None


class Shard(NamedTuple):
    """One of several parts of a plan, counted from 1."""

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @property
    def folder(self) -> str:
        """Its folder below ``output_dir``."""
        return f"shard-{self.number}of{self.total}"


def _shard(value: Any) -> Any:
    """Read "3/8"."""
    if isinstance(value, tuple | list) and len(value) == 2:  # validated before
        return Shard(*value)
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", str(value))
    if not match or int(match[1]) > int(match[2]):
        raise ValueError("expected one of N parts as 1/N … N/N, such as 3/8")
    return Shard(int(match[1]), int(match[2]))


def _workers(value: Any) -> int | str:
    text = str(value)
    if text == "all":
        return text
    if re.fullmatch(r"[1-9]\d*", text):
        return int(text)
    raise ValueError("expected a number of workers, or all")


Lengths = Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_words)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_words)]
PositiveNumbers = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_words)]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(_words)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
OutputLength = Annotated[str, BeforeValidator(output_length)]
_Count = Annotated[int, Field(gt=0)]
_AS_WRITTEN = PlainSerializer(lambda pair: f"{pair[0]}x{pair[1]}", when_used="json")
Tiling = Annotated[tuple[_Count, _Count], BeforeValidator(_tiling), _AS_WRITTEN]
Size = Annotated[tuple[_Count, _Count], BeforeValidator(_size), _AS_WRITTEN]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_words)]
Workers = Annotated[int | str, BeforeValidator(_workers)]
PartOfPlan = Annotated[Shard, BeforeValidator(_shard), PlainSerializer(str, when_used="json")]
TilingOrNone = Annotated[Tiling | None, BeforeValidator(_tiling_or_none)]
