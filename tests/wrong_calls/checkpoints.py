"""Checkpoints that the trainer cannot use: another model's, damaged ones, foreign folders."""

import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.train_lm.flags import Refusal
from experiments.train_lm.trainer.checkpoints import Checkpoints
from experiments.train_lm.trainer.state import State
from tests.wrong_calls import flags as of
from tests.wrong_calls.commands import Refused
from tests.wrong_calls.mistakes import always, mistake
from tests.wrong_calls.oracle import Target

_NUMBERS = itertools.count()
Change = Callable[[Path], Any]


def _state(kernel: Any = None, **more: Any) -> State:
    kernel = jnp.ones((4, 3, 3), jnp.float32) if kernel is None else kernel
    zero = jnp.zeros((), jnp.int32)
    params = {"ends": jnp.ones(3, jnp.float32), "blocks": {"kernel": kernel}, **more}
    return State(step=zero, params=params, opt_state={"count": zero}, rng=zero)


@functools.cache
def _saved(name: str) -> Path:
    """Saves a state, once."""
    states: dict[str, Callable[[], State]] = {
        "good": _state,
        "another shape": lambda: _state(jnp.ones((4, 3, 5), jnp.float32)),
        "fewer layers": lambda: _state(jnp.ones((2, 3, 3), jnp.float32)),
        "another dtype": lambda: _state(jnp.full((4, 3, 3), 0.1, jnp.bfloat16)),
        "extra leaf": lambda: _state(more=jnp.ones(2, jnp.float32)),
        "missing leaf": lambda: dataclasses.replace(_state(), opt_state={}),
    }
    folder = of.folder() / f"saved {name}"
    checkpoints = Checkpoints(folder, keep=1, warn=lambda _: None)
    checkpoints.save(1, states[name](), {}, held_out_loss=None)
    checkpoints.close()
    return folder


def _copy(name: str, change: Change = lambda step: None) -> Callable[[], Path]:
    """Makes a function that copies a saved folder, as a restore may move its checkpoint aside."""

    def copy() -> Path:
        folder = of.folder() / f"run {next(_NUMBERS)}" / "checkpoints"
        shutil.copytree(_saved(name), folder)
        change(folder / "1")
        return folder

    return copy


def _put_folder(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()
    (step / "weights.bin").write_bytes(bytes(100))


def _place(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _restore(folder: Callable[[], Path]) -> None:
    """Restores, and requires the state that was saved."""
    path = folder()
    checkpoints = Checkpoints(path, keep=1, warn=lambda _: None)
    try:
        restored = checkpoints.restore(jax.tree.map(_place, _state()))
    except Refusal as error:
        raise Refused(error.message) from error
    else:
        if restored is not None:
            same = jax.tree.map(lambda a, b: bool((a == b).all()), restored.state, _state())
            assert jax.tree.all(same)
    finally:
        checkpoints.close()
        shutil.rmtree(path.parent)


def targets() -> list[Target]:
    """Lists the reader of checkpoints."""
    named = {"also": ("checkpoints",)}
    return [
        Target(
            name="experiments.train_lm.trainer.Checkpoints",
            call=lambda folder: _restore(folder),
            valid={"folder": _copy("good")},
            mistakes={
                "folder": [
                    mistake("wrong shape", _copy("another shape"), _copy("fewer layers"), **named),
                    mistake("wrong dtype", _copy("another dtype"), **named),
                    mistake("extra key", _copy("extra leaf"), **named),
                    mistake("missing leaf", _copy("missing leaf"), **named),
                    mistake(
                        "malformed file",
                        _copy("good", lambda step: (step / "facts/metadata").write_text("{}")),
                        _copy("good", lambda step: (step / "state/_METADATA").write_bytes(b"\xff")),
                        _copy("good", lambda step: shutil.rmtree(step / "state")),
                        _copy("good", _put_folder),
                        **named,
                    ),
                    mistake(
                        "another form",
                        _copy("good"),
                        _copy("good", shutil.rmtree),
                        legal=always,
                    ),
                ]
            },
            raises=(Refused,),
            takes_more=True,
        )
    ]
