"""The package's exceptions.

NormDynError (a ValueError)
├── NoTargetsError      nothing matches what was asked for
└── NotSupportedError   a model, optimizer or strategy fact that cannot be handled rightly
"""


class NormDynError(ValueError):
    """Anything this package refuses; the message says what was asked, what was found, and one way out."""


class NoTargetsError(NormDynError):
    """No weight matches what was asked for."""


class NotSupportedError(NormDynError):
    """A weight, optimizer or strategy that cannot be handled rightly, and so is not handled at all."""


class NormDynWarning(UserWarning):
    """Something a person should know; said once."""
