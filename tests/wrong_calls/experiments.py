"""The commands of the experiments with one flag broken, or two, until they would begin to work."""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax

import dualpipe_jax as dpj
from tests.wrong_calls import flags as of
from tests.wrong_calls.commands import Accepted, Refused, run
from tests.wrong_calls.mistakes import Mistake, always, but, mistake
from tests.wrong_calls.oracle import Target


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Holds the command of an experiment, and flags that it refuses before it does any work.

    Attributes:
      module: The module, whose `main(args)` is the command.
      valid: Flags of a valid command.
      flags: Classes of mistakes, by flag.
      stops: Functions, by module and name, at which flags have been checked.
    """

    module: str
    valid: Mapping[str, Any]
    flags: Mapping[str, Sequence[Mistake]]
    stops: Sequence[tuple[str, str]] = ()


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise Accepted


@contextlib.contextmanager
def _without_work(stops: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Lets a command end where it would begin to work, and keeps the settings of JAX."""
    flags = importlib.import_module("experiments.train_lm.flags")
    make_folder = flags.make_folder

    def make_and_stop(path: Path) -> None:
        make_folder(path)
        raise Accepted

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(jax.config, "update", return_value=None))
        stack.enter_context(mock.patch.object(flags, "make_folder", make_and_stop))
        for module, name in stops:
            stack.enter_context(mock.patch.object(sys.modules[module], name, _stop))
        yield


def _experiment_target(experiment: Experiment) -> Target:
    module = importlib.import_module(experiment.module)

    def call(**given: Any) -> None:
        with _without_work(experiment.stops):
            run(module.main, (), given)

    return Target(
        name=experiment.module,
        call=call,
        valid=experiment.valid,
        # The line of an experiment repeats all of a value that Click cannot read.
        mistakes={
            name: but(made, "very long text", "number beyond all floats")
            for name, made in experiment.flags.items()
        },
        raises=(Refused,),
    )


def _size() -> list[Mistake]:
    """Mistakes in a size that may be as large as a user has patience for."""
    return of.counts(too_large=False)


def _output() -> dict[str, str]:
    return {"output": str(of.folder() / "out")}


def _that_run() -> list[Experiment]:
    size, output, valid = _size(), of.folders(), _output()
    names = of.choices(dpj.schedules.names())
    seed = [*of.counts(least=0), mistake("number far too large", "4294967296", str(2**70))]
    return [
        Experiment(
            module="experiments.compare.idle",
            valid=valid,
            flags={
                **dict.fromkeys(("layers", "width", "context", "heads", "vocabulary"), size),
                **{name: of.counts() for name in ("ranks", "microbatches")},
                "heads": [*size, mistake("number that does not divide", "7", "4097")],
                "transfer": of.amounts(),
                "output": output,
            },
        ),
        Experiment(
            module="experiments.compare.search",
            valid=valid,
            flags={
                "moves": of.counts(),
                "only": [*of.counts(), mistake("number far too large", "99")],
                "output": output,
            },
        ),
        Experiment(
            module="experiments.compare.schedules",
            valid={**valid, "ranks": "2", "schedule": "1f1b", "microbatches": "4"},
            flags={
                "schedule": names,
                "ranks": of.counts(),
                "microbatches": of.counts(),
                "steps": [*size, mistake("number far too small", "1")],
                **dict.fromkeys(("batch-size", "context", "layers", "width"), size),
                "heads": [*size, mistake("number that does not divide", "7", "65")],
                "learning-rate": of.amounts(is_open=True),
                "seed": seed,
                "output": output,
            },
        ),
        Experiment(
            module="experiments.by_the_clock.by_the_clock",
            valid={**valid, "ranks": "2"},
            flags={
                "ranks": [*of.counts(), mistake("number far too small", "1")],
                "schedules": names,
                "repeats": size,
                "scale": of.amounts(is_open=True),
                "output": output,
            },
        ),
        Experiment(
            module="experiments.hardware.hardware",
            valid=valid,
            flags={
                "minutes": of.amounts(is_open=True),
                "part": of.choices(("step",)),
                "schedule": names,
                "family": of.choices(("mlp",)),
                "layers": [*size, mistake("number that does not divide", "1", "3")],
                "width": [*size, mistake("number that does not divide", "100", "129")],
                "tokens": [*size, mistake("number that does not divide", "1500", "1025")],
                **dict.fromkeys(("devices", "microbatches", "rounds"), size),
                "output": output,
            },
        ),
        Experiment(
            module="experiments.benchmarks.benchmarks",
            valid=valid,
            flags={
                "ranks": of.counts(),
                "remat": of.choices(("none", "block")),
                "variant": of.choices(("dualpipe",)),
                **dict.fromkeys(("rounds", "layers", "width", "sequence", "vocabulary"), size),
                **dict.fromkeys(("microbatch-size", "microbatches-per-rank"), size),
                "heads": [*size, mistake("number that does not divide", "7", "257")],
                "seed": seed,
                "output": output,
            },
        ),
    ]


def _that_compile() -> list[Experiment]:
    size, output, valid = _size(), of.folders(), _output()
    sharded = ("ranks", "microbatches", "layers", "width", "vocabulary", "context")
    return [
        Experiment(
            module="experiments.hardware.graphs",
            valid=valid,
            flags={
                "commands": of.choices(("conditionals, loops",)),
                **dict.fromkeys(("width", "tokens"), size),
                "output": output,
            },
        ),
        Experiment(
            module="experiments.compiled.overlap",
            valid=valid,
            flags={
                "width": [*size, mistake("number that does not divide", "1000", "129")],
                "layers": size,
                "output": output,
            },
        ),
        Experiment(
            module="experiments.compiled.backwards",
            valid=valid,
            flags={
                "width": [*size, mistake("number that does not divide", "1000", "129")],
                "layers": [*size, mistake("number far too small", "1")],
                "tokens": size,
                "output": output,
            },
        ),
        Experiment(
            module="experiments.compiled.slices",
            valid=valid,
            flags={
                "width": [*size, mistake("number that does not divide", "1000", "129")],
                "tokens": size,
                "mesh": of.choices(("data 8",)),
                "schedule": of.choices(("dualpipe",)),
                "output": output,
            },
        ),
        Experiment(
            module="experiments.compiled.memory",
            valid=valid,
            flags={
                **dict.fromkeys(("ranks", "width", "heads", "sequence", "vocabulary"), size),
                "layers": [*size, mistake("number that does not divide", "7", "9")],
                "schedule": of.choices(("dualpipe",)),
                "output": output,
            },
        ),
        Experiment(
            module="experiments.fuzz_losses.fuzz_losses",
            valid=valid,
            flags={
                "seed": of.counts(least=0, too_large=False),
                **dict.fromkeys(("count", "jobs"), size),
                "output": output,
            },
        ),
        Experiment(
            module="experiments.sharded.ends",
            valid={},
            flags={
                **dict.fromkeys(sharded, size),
                "layers": [*size, mistake("number that does not divide", "7", "9", "24")],
                "ranks": [*size, mistake("number far too small", "1", "2")],
            },
            stops=[("experiments.sharded.ends", "measure")],
        ),
        Experiment(
            module="experiments.sharded.zero",
            valid={},
            flags={
                **dict.fromkeys((*sharded, "shards"), size),
                "width": [*size, mistake("number that does not divide", "7", "257")],
            },
            stops=[("experiments.sharded.zero", "measure")],
        ),
    ]


def _that_train() -> list[Experiment]:
    """Lists the commands with the trainer's flags, which begin to work when they make the model."""
    model = {
        "ranks": "2",
        "layers": "4",
        "width": "16",
        "heads": "2",
        "context": "16",
        "batch-size": "8",
        "microbatches": "2",
        "data": __file__,
        "output": str(of.folder() / "train"),
    }
    common = _flags_of_runs()
    trainer = "experiments.train_lm"
    moe = "experiments.deepseek_mini.deepseek_mini"
    size = _size()
    return [
        Experiment(
            module=f"{trainer}.train_lm",
            valid=model,
            flags={
                **common,
                "heads": [*size, mistake("number that does not divide", "3", "17")],
                "dropout": [*of.amounts(), mistake("number far too large", "1", "1.5", "1e300")],
                "dtype": of.choices(("float32", "bfloat16")),
                "stages-per-rank": of.counts("num_stages_per_rank"),
                "prompt": [mistake("empty", ""), mistake("odd characters", "\udcff")],
            },
            stops=[(f"{trainer}.train_lm", "LanguageModel")],
        ),
        Experiment(
            module=moe,
            valid={**model, "width": "64", "dense-layers": "1", "experts": "4"},
            flags={
                **common,
                "heads": [*size, mistake("number that does not divide", "3", "17")],
                "expert-devices": of.counts(),
                "dense-layers": [*of.counts(least=0), mistake("number far too large", "4", "5")],
                "experts": [*size, mistake("number that does not divide", "3", "5")],
                "chosen": [*size, mistake("number far too large", "5", "100")],
                "capacity-factor": of.amounts(is_open=True),
                "bias-rate": of.amounts(),
            },
            stops=[(moe, "_sizes")],
        ),
        _that_finetunes(common),
    ]


def _that_finetunes(common: Mapping[str, Sequence[Mistake]]) -> Experiment:
    module = "experiments.finetune.finetune"
    size = _size()
    no_sizes = ("layers", "width")
    return Experiment(
        module=module,
        valid={
            "model": str(of.model()),
            "ranks": "2",
            "context": "16",
            "microbatches": "2",
            "data": __file__,
            "output": str(of.folder() / "finetune"),
        },
        flags={
            **{name: made for name, made in common.items() if name not in no_sizes},
            "model": of.folders_of_models(),
            "lora-rank": size,
            "lora-alpha": [mistake("given alone", "1", "2.5"), *of.amounts(is_open=True)],
            "dtype": of.choices(("float32", "bfloat16")),
            "remat": of.choices(("none", "block")),
        },
        stops=[(module, "_make_tuning")],
    )


def _flags_of_runs() -> dict[str, Sequence[Mistake]]:
    """Mistakes in the flags that the trainer adds, and in the sizes of its models."""
    size = _size()
    counted = ("steps", "context", "width", "eval-every", "eval-batches", "save-every", "keep")
    alone = {"also": ("coordinator",)}
    return {
        **dict.fromkeys((*counted, "max-skips"), size),
        "layers": [*size, mistake("fewer layers than stages", "1")],
        "batch-size": [*size, mistake("number that does not divide", "7", "9")],
        **dict.fromkeys(("ranks", "microbatches", "data-devices", "fsdp-devices"), of.counts()),
        "schedule": of.choices(dpj.schedules.names()),
        "learning-rate": of.amounts(is_open=True),
        "seed": [*of.counts(least=0), mistake("number far too large", "4294967296", str(2**70))],
        "on-save-error": of.choices(("stop", "continue")),
        "log": [
            mistake("unknown name", "csv", "jsonl,xml", "JSONL", "tensor board"),
            mistake("another form", "jsonl", "jsonl,tensorboard", " jsonl", legal=always),
        ],
        "profile": [
            mistake("malformed text", "3", "3:", ":3", "a:b", "0:2", "5:2", "-1:2", "1:2:3", ""),
            mistake("number far too large", "600:700", "9" * 30 + ":" + "9" * 40),
            mistake("another form", "1:2", "3:3", legal=always),
        ],
        "coordinator": [mistake("given alone", "here:1234", "here"), mistake("empty", "")],
        "num-processes": [mistake("given alone", "1", "2", **alone), *of.counts(too_large=False)],
        "process-id": [mistake("given alone", "0", "7", **alone), mistake("negative number", "-1")],
        "heartbeat": [*size, mistake("number far too small", "1", "9")],
        "stopped-code": [*of.counts(least=0), mistake("number far too large", "256")],
        "data": of.texts_to_learn(),
        "config": of.files_of_flags(),
        "output": [*of.folders(), *of.folders_of_runs()],
    }


def targets() -> list[Target]:
    """Lists the commands of the experiments; one more is one more `Experiment` above."""
    experiments = (*_that_run(), *_that_compile(), *_that_train())
    return [_experiment_target(experiment) for experiment in experiments]
