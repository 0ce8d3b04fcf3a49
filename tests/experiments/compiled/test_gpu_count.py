"""The count of overlapped transfers: what it refuses. preflight/test_gpu.py has what it counts."""

import importlib.util

import pytest

import dualpipe_jax as dpj
from experiments.compiled import gpu
from tests.preflight.steps import make_args, make_mesh, make_step


def test_without_the_compiler_it_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        gpu.main([])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("overlap: topology='gpu:h100:8': needs a compiler")
    assert "pip install 'jax[cuda13]'" in line


def test_a_program_without_a_steady_loop_is_not_counted() -> None:
    mesh = make_mesh(4)
    step = make_step(mesh, overlap=False)
    report = dpj.preflight(step, make_args(mesh), "cpu:4")
    with pytest.raises(ValueError, match="must be of a program with a steady loop"):
        gpu.count(report, "collective-permute")
