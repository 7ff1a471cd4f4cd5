"""What a page is made of: escaped values, and the hash that its policy names a script by."""

from __future__ import annotations

import base64
import hashlib

from lightning_normdyn.monitor.report.document import policy_hash


def test_a_policy_names_a_script_by_its_hash():
    digest = base64.b64decode(policy_hash("alert(1)").removeprefix("sha256-"))
    assert digest == hashlib.sha256(b"alert(1)").digest()
