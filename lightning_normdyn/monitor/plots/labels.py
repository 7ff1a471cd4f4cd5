"""Names of layers, runs and events as texts that fit a picture and that matplotlib draws as they
stand."""

from __future__ import annotations

from collections.abc import Sequence


def short_name(name: str) -> str:
    """A parameter's name as a label: without the ``.weight`` that all of them end in, and not
    longer than a label can be."""
    return plain_text(elide(name.removesuffix(".weight"), 28))


def layer_labels(names: Sequence[str]) -> list[str]:
    """Labels that tell these names apart: of long ones, what all of them begin with is left out
    before anything else is."""
    texts = [name.removesuffix(".weight") for name in names]
    parts = [text.split(".") for text in texts]
    shared = 0
    if len(names) > 1 and max(map(len, texts)) > 28:
        while all(len(each) > shared + 1 and each[shared] == parts[0][shared] for each in parts):
            shared += 1
    texts = [".".join(each[shared:]) for each in parts]
    for length in (28, 40, 60):
        labels = [plain_text(elide(text, length)) for text in texts]
        if len(set(labels)) == len(set(texts)):
            break
    return labels


def in_legend(text: str) -> str:
    """Matplotlib leaves labels that begin with an underscore out of legends; one with a blank
    before it is shown."""
    return f" {text}" if text.startswith("_") else text


def elide(text: str, length: int) -> str:
    """At most ``length`` characters: of a longer text the middle is left out."""
    return (
        text
        if len(text) <= length
        else f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"
    )


def plain_text(text: str) -> str:
    """Text that matplotlib draws as it stands: no formula between dollar signs, nothing
    unprintable."""
    return "".join(character if character.isprintable() else "?" for character in text).replace(
        "$", r"\$"
    )
