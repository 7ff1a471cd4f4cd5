"""What a page is made of: escaped values, what is packed in it, and the scripts that its policy
names."""

from __future__ import annotations

import base64
import gzip
import hashlib
from pathlib import Path

import pytest

from lightning_normdyn.monitor.report import document
from lightning_normdyn.monitor.report.document import packed_text, policy_hash, rendered


def test_a_policy_names_a_script_by_its_hash():
    digest = base64.b64decode(policy_hash("alert(1)").removeprefix("sha256-"))
    assert digest == hashlib.sha256(b"alert(1)").digest()


def test_what_is_packed_comes_out_as_it_was_and_is_the_same_every_time():
    text = "</template><script>alert(1)</script> η ‖w‖"
    packed = packed_text(text)
    assert packed == packed_text(text)
    assert gzip.decompress(base64.b64decode(packed, validate=True)).decode() == text
    assert "<" not in packed


def test_values_are_escaped_and_our_own_scripts_are_not(monkeypatch, tmp_path):
    (tmp_path / "small.html").write_text("{{ name }}{{ scripts[0] }}{{ style }}{{ packed }}")
    (tmp_path / "table.js").write_text("1 < 2;")
    (tmp_path / "page.css").write_text("a > b {}")
    monkeypatch.setattr(document, "_FOLDER", tmp_path)
    page = rendered("small.html", interactive=False, name="<b>")
    assert page == "&lt;b&gt;1 < 2;a > b {}None"


def test_an_interactive_page_without_plotly_is_refused(monkeypatch):
    monkeypatch.setattr(document, "plotly_script", lambda: None)
    with pytest.raises(FileNotFoundError, match="plotly"):
        rendered("page.html", interactive=True, data={})


def test_plotly_is_found_without_being_imported(monkeypatch):
    script = document.plotly_script()
    assert script is None or (isinstance(script, Path) and script.stat().st_size > 1_000_000)
    monkeypatch.setattr(document.importlib.util, "find_spec", lambda name: None)
    assert document.plotly_script() is None
