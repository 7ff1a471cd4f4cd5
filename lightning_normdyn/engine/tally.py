"""In how many steps a callback acted."""

from dataclasses import dataclass


@dataclass
class Tally:
    """In how many steps of one optimizer a callback meant to act, and in how many it found
    something to act on.

    Args:
        due: steps in which it was to act.
        acted: those of them in which some target had a gradient.
    """

    due: int = 0
    acted: int = 0
    _last: int = 0

    def note(self, number: int, found: bool) -> None:
        """Count step ``number``; several notes about one step count once."""
        if number != self._last:
            self._last = number
            self.due += 1
            self.acted += found
