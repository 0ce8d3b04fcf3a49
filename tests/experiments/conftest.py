"""Fixtures of the experiments' tests."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.experiments import refusals


@pytest.fixture
def refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Gives `refusal(main, args, name=...)`, which requires a command to refuse bad flags."""
    return partial(
        refusals.refusal, output=tmp_path / "out", capsys=capsys, monkeypatch=monkeypatch
    )
