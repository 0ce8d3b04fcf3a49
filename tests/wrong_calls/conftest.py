"""Writes the figures of `make wrong-calls` into the documentation, if all calls ended well."""

import os
from pathlib import Path

import pytest

from experiments import documents
from tests.wrong_calls.oracle import TALLY

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def pytest_sessionfinish(exitstatus: int | pytest.ExitCode) -> None:
    if "WRONG_CALLS" in os.environ and exitstatus == 0 and TALLY.calls:
        documents.write_into(PAGE, TALLY.report(), name="wrong-calls")
