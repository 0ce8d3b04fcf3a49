"""Figures of the faults, printed below pytest's own summary of their tests."""

from collections.abc import Callable

import pytest

_FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []


@pytest.fixture(scope="session")
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keeps a line for the end."""
    return request.config.stash[_FIGURES].append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.section("figures")
    for line in config.stash[_FIGURES]:
        terminalreporter.write_line(line)
