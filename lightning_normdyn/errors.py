"""The package's exceptions.

NormDynError (a ValueError)
├── NoTargetsError      nothing matches what was asked for
└── NotSupportedError   a model, optimizer or strategy fact that cannot be handled rightly
"""

import reprlib


class NormDynError(ValueError):
    """Anything this package refuses; the message says what was asked, what was found, and one way
    out."""


class NoTargetsError(NormDynError):
    """No weight matches what was asked for."""


class NotSupportedError(NormDynError):
    """A weight, optimizer or strategy that cannot be handled rightly, and so is not handled at
    all."""


class NormDynWarning(UserWarning):
    """Something a person should know; said once."""


def shown(value: object) -> str:
    """A value as a message shows it: short, whatever it is.

    Example:
        >>> shown(-1.0), shown(10**5000)
        ('-1.0', 'a number of 16610 bits')
    """
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return (
            f"a number of {value.bit_length()} bits"
            if isinstance(value, int)
            else f"a {type(value).__name__}"
        )
