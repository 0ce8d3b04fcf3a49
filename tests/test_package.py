"""The package's door: the names and modules that `import dualpipe_jax` loads, and no more."""

import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dualpipe_jax
from tests.commands import modules_after


@pytest.mark.parametrize("name", dualpipe_jax.__all__)
def test_public_name_is_there(name: str) -> None:
    assert getattr(dualpipe_jax, name) is not None
    assert name in dir(dualpipe_jax)


def test_names_are_the_objects_of_their_modules() -> None:
    from dualpipe_jax import schedules

    assert dualpipe_jax.schedules is schedules
    assert dualpipe_jax.Schedule is schedules.Schedule


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'dualpipe_jax' has no attribute 'bogus'"):
        _ = dualpipe_jax.bogus


def test_an_install_brings_the_library_and_nothing_beside_it(tmp_path: Path) -> None:
    """As `make` installs it: a user may have packages called `experiments` and `tests`."""
    names = ["dualpipe_jax", "experiments", "tests"]
    code = f"from importlib.util import find_spec; print(*filter(find_spec, {names}))"
    # Isolated, a Python has neither the working folder nor PYTHONPATH on its path.
    line = [sys.executable, "-I", "-c", code]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dualpipe_jax"]


def test_each_stop_of_the_walk_through_a_step_is_a_function() -> None:
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    stops = re.findall(r"^\d+\. `([\w.]+)`", page, re.MULTILINE)
    assert 8 <= len(stops) <= 12
    for stop in stops:
        found = pkgutil.resolve_name(f"dualpipe_jax.{stop}")
        assert inspect.isfunction(found)
        assert inspect.getdoc(found)


def test_import_is_lazy() -> None:
    assert not modules_after("import dualpipe_jax") & {"jax", "numpy", "click", "matplotlib"}
    assert "jax" not in modules_after("import dualpipe_jax; dualpipe_jax.schedules.names()")
    assert "jax" in modules_after("import dualpipe_jax; dualpipe_jax.Model")
    imported = modules_after("import dualpipe_jax; dualpipe_jax.value_and_grad")
    assert not imported & {"flax", "optax"}
    assert "flax" in modules_after("import dualpipe_jax; dualpipe_jax.linen")


@pytest.mark.parametrize("image_format", ["text", "csv", "json", "html"])
def test_command_line_imports_no_jax(image_format: str) -> None:
    arguments = ["timeline", "--ranks", "2", "--microbatches", "4", "--format", image_format]
    imported = modules_after(
        f"from dualpipe_jax.__main__ import main; main({arguments}, standalone_mode=False)"
    )
    assert not imported & {"jax", "jaxlib", "flax", "matplotlib"}
    assert "click" in imported
