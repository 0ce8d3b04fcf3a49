"""Fixtures of the experiments' tests."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest


@pytest.fixture
def refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Gives `refusal(main, args, name=...)`, which requires a command to refuse bad flags."""

    def refuse(main: Callable[[list[str]], Any], args: Sequence[str], *, name: str) -> str:
        """Requires one line on stderr, nothing on stdout and exit code 2; returns the line."""
        # JAX's backends have started here, so the fake devices are the eight of tests/conftest.py.
        monkeypatch.setattr(jax.config, "update", lambda *_: None)
        with pytest.raises(SystemExit) as exit_info:
            main([*args, "--output", str(tmp_path / "out")])
        assert exit_info.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"{name}: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return refuse
