"""The errors a user can cause, each one clear sentence: what was found, what was expected, what to do.

``UserError``
    anything the user can mend: a wrong value, a missing file, data that is not what it should be.
``├ DataError``
    a dataset, file or table that cannot be used as it is.
``├ ModelError``
    a model that is unknown, does not fit, or whose parts cannot be told apart.
``└ MeasurementError``
    a measurement that stopped, is incomplete, or must not be mixed with another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """What the command line prints without a traceback."""


class DataError(UserError):
    """A dataset, file or table cannot be used as it is."""


class ModelError(UserError):
    """A model is unknown, does not fit, or its parts cannot be told apart."""


class MeasurementError(UserError):
    """A measurement stopped, is incomplete, or must not be mixed with another."""


@contextmanager
def blaming(path: Path | str, expected: str, kind: type[UserError] = DataError) -> Iterator[None]:
    """Turn whatever a user's file makes its reader raise into one sentence about the file.

    Parameters
    ----------
    path
        The file, or what else was read.
    expected
        What it should have been, and where that comes from.
    kind
        Which error to raise.

    Raises
    ------
    UserError
        Of the given kind; one that the reader raised itself goes through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # bytes, types and numbers of any kind make a reader raise any kind
        text = " ".join(str(error).split())[:200]
        raise kind(f"{path} is not {expected}: {type(error).__name__}: {text}") from error
