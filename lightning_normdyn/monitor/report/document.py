"""A page as one file: its template, the script that its policy names, and what is packed in it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def rendered(template: str, **values: Any) -> str:
    """The text of a template beside this file, every value escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Names of layers and runs are text, whatever markup they hold.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["policy_hash"] = policy_hash
    return environment.get_template(template).render(values)


def policy_hash(script: str) -> str:
    """What a Content-Security-Policy names a script by."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
