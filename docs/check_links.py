"""Check that every local link of a built site leads to a page, a heading or a file of it.

``python docs/check_links.py FOLDER`` prints the broken ones and ends with 1 if there are any.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page links to, and the places in it that links may name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if value and key in ("href", "src"):
                self.links.append(value)
            if value and key in ("id", "name"):
                self.places.add(value)


def broken_links(folder: Path) -> Iterator[str]:
    """Page and link, for each link that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            # Links to other sites are no part of this: they need a network.
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                target = (path.parent / unquote(parts.path)).resolve()
            name = unquote(parts.fragment)
            is_there = target.exists()
            if is_there and name and target in pages:
                is_there = name in pages[target].places
            if not is_there:
                yield f"{path.relative_to(folder.resolve())}: {link}"


def main() -> int:
    broken = list(broken_links(Path(sys.argv[1])))
    print("\n".join(broken) or "every local link leads somewhere")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
