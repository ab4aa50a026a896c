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


class UserError(ValueError):
    """What the command line prints without a traceback."""


class DataError(UserError):
    """A dataset, file or table cannot be used as it is."""


class ModelError(UserError):
    """A model is unknown, does not fit, or its parts cannot be told apart."""


class MeasurementError(UserError):
    """A measurement stopped, is incomplete, or must not be mixed with another."""
