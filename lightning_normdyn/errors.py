"""The package's exceptions.

NormDynError (a ValueError)
├── NoTargetsError      nothing matches what was asked for
└── NotSupportedError   a model, optimizer or strategy fact that cannot be handled rightly
"""

import difflib
import reprlib
from collections.abc import Iterable


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


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that it is nearest to; empty where
    none is near.

    Example:
        >>> did_you_mean("angular_updates", ["weight_norm", "angular_update"])
        ' Did you mean `angular_update`?'
        >>> did_you_mean("loss", ["weight_norm", "angular_update"])
        ''
    """
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean `{near[0]}`?" if near else ""
