"""`memlens check`: the table and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memlens.models.load as loading
from memlens.cli.app import app


def run(*arguments: str) -> int:
    try:
        app(list(arguments), exit_on_error=False, print_error=False)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_right_model_exits_with_0(
    tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", str(tiny_folder("llama")), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert {"logits", "trunk", "site z", "fast path"} <= {check["name"] for check in found["checks"]}
    assert run("check", str(tiny_folder("llama"))) == 0
    assert "site z" in capsys.readouterr().out


def test_a_wrong_model_exits_with_1_and_says_where(
    tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = loading.build_bridge

    def lossy(*args: Any, **kwargs: Any) -> Any:
        bridge = build(*args, **kwargs)
        bridge.blocks[1].attn.o.original_component.weight.data[:, :4] = 0
        return bridge

    monkeypatch.setattr(loading, "build_bridge", lossy)
    assert run("check", str(tiny_folder("llama"))) == 1
    assert "first in layer 1" in capsys.readouterr().out
