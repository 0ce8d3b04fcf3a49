"""The refusal of bad flags by every experiment's command."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest


def refusal(
    main: Callable[[list[str]], Any],
    args: Sequence[str],
    *,
    name: str,
    output: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Requires one line on stderr, nothing on stdout and exit code 2; returns the line."""
    # JAX's backends have started here, so the fake devices are conftest's eight.
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit) as exit_info:
        main([*args, "--output", str(output)])
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"{name}: ")
    assert printed.err.count("\n") == 1
    return printed.err
