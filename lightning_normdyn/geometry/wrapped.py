"""What an optimizer updates in place of the parameters: the float32 master weights of DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Master:
    """A slice of the flat float32 tensor that DeepSpeed's optimizer updates; the parameter itself
    is a copy of it.

    Args:
        flat: the tensor.
        start: where the weight's entries on this rank begin in it.
        length: how many they are.
    """

    # Held as a whole and not as the slice: gradients and state have the same layout.
    flat: Tensor
    start: int
    length: int

    def value(self) -> Tensor:
        """The entries on this rank."""
        return self.of(self.flat)

    def gradient(self) -> Tensor | None:
        """Their gradient, unscaled and clipped.

        It is there only while the step runs: DeepSpeed assembles it just before and frees it after.
        """
        if self.flat.grad is None:
            return None
        return self.of(self.flat.grad)

    def of(self, flat: Tensor) -> Tensor:
        """The same entries of another tensor of this layout (optimizer state)."""
        return flat.detach()[self.start : self.start + self.length]
