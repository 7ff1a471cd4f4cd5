"""Names of layers, runs and events as texts that fit a picture and that matplotlib draws as they
stand."""

from __future__ import annotations

from collections.abc import Sequence

_LONG = 28


def short_name(name: str) -> str:
    """A parameter's name as a label: without the ``.weight`` that all of them end in, and not
    longer than a label can be."""
    return fitted(name.removesuffix(".weight"), _LONG)


def layer_labels(names: Sequence[str]) -> list[str]:
    """Labels that tell these names apart: of long ones, what all of them begin with is left out
    before anything else is."""
    texts = [name.removesuffix(".weight") for name in names]
    if len(texts) > 1 and max(map(len, texts)) > _LONG:
        paths = [text.split(".") for text in texts]
        shared = 0
        # Without their last parts: each name must keep something.
        for parts in zip(*(path[:-1] for path in paths), strict=False):
            if len(set(parts)) > 1:
                break
            shared += 1
        texts = [".".join(path[shared:]) for path in paths]

    labels: list[str] = []
    # Names that differ in the middle alone need more room to stay apart.
    for length in (_LONG, 40, 60):
        labels = [fitted(text, length) for text in texts]
        if len(set(labels)) == len(set(texts)):
            break
    return labels


def in_legend(text: str) -> str:
    """A label that a legend shows: matplotlib leaves out those that begin with an underscore, but
    not those with a blank before it."""
    return f" {text}" if text.startswith("_") else text


def fitted(text: str, length: int) -> str:
    """At most ``length`` characters, drawn as they stand: of a longer text the middle is left
    out."""
    if len(text) > length:
        half = length // 2
        text = f"{text[: half - 1]}…{text[half - length :]}"
    for character in set(text):
        # No font has a glyph for it, and a line break would move everything below.
        if not character.isprintable():
            text = text.replace(character, "?")
    # Matplotlib takes what stands between two dollar signs for a formula.
    return text.replace("$", r"\$")
