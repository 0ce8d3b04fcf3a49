"""Mistakes in the flags of command lines, as a shell gives them: texts, and files of costs."""

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.experiments.finetune.published import make
from tests.wrong_calls.mistakes import Mistake, always, mistake

# A flag that is given without a value.
ALONE = object()


def _flag(*also: str) -> dict[str, Any]:
    return {"also": also}


def counts(*also: str, least: int = 1, too_large: bool = True) -> list[Mistake]:
    """Mistakes in a flag for a number of things; a library's message may name it otherwise."""
    named = _flag(*also)
    large = st.integers(10**13, 10**30).map(str)
    return [
        mistake("text for a number", "four", "4,5", "0x10", "1e3", "4 5", "--4", "+-4", **named),
        mistake("float for an integer", "4.0", "2.5", "nan", "inf", "-inf", **named),
        mistake("empty", "", " ", "\t", **named),
        mistake("odd characters", "4\udcff", "\x00", "\n4\n5", "\u2028", "\U0001f600", **named),
        *([mistake("zero", "0", "-0", **named)] if least > 0 else []),
        mistake("negative number", st.integers(max_value=-1).map(str), **named),
        *([mistake("number far too large", large, **named)] if too_large else []),
        mistake("number beyond all floats", "9" * 5000, "-" + "9" * 5000, **named),
        mistake("very long text", "x" * 100_000, **named),
        mistake("flag without a value", ALONE),
    ]


def amounts(*also: str, is_open: bool = False) -> list[Mistake]:
    """Mistakes in a flag for a real number."""
    named = _flag(*also)
    return [
        mistake("text for a number", "one", "1,5", "0x10", "1/2", "1e", **named),
        mistake("NaN", "nan", "NAN", "-nan", **named),
        mistake("infinite", "inf", "-inf", "Infinity", **named),
        mistake("empty", "", " ", **named),
        mistake("odd characters", "1\udcff", "\x00", "1\n2", **named),
        mistake("negative number", "-1", "-1e-9", "-1e300", **named),
        *([mistake("zero", "0", "0.0", "-0", **named)] if is_open else []),
        mistake("number beyond all floats", "1e400", "9" * 5000, "-1e400", **named),
        mistake("very long text", "x" * 100_000, **named),
        mistake("flag without a value", ALONE),
    ]


def choices(known: Sequence[str], *also: str) -> list[Mistake]:
    """Mistakes in a flag that takes one of a few names."""
    named = _flag(*also)
    near = [f for name in known for f in (name.upper(), name[:-1], f"{name} ", f" {name}")]
    return [
        mistake("unknown name", *({*near, "other"} - {*known}), **named),
        mistake("empty", "", " ", **named),
        mistake(
            "odd characters", "\udcff", "\x00", "\n", "a\nb", "\u2028", "[red]x[/red]", **named
        ),
        mistake("very long text", "x" * 100_000, "\n" * 3000, **named),
        mistake("flag without a value", ALONE),
    ]


def sizes_in_bytes(*also: str) -> list[Mistake]:
    """Mistakes in a flag for a number of bytes."""
    named = _flag(*also)
    return [
        mistake("unknown unit", "80XB", "GiB", "80 80", "8,0GiB", "80GiBGiB", "eighty", **named),
        mistake("NaN", "nan", "nanGiB", **named),
        mistake("infinite", "inf", "-infGiB", "1e400", **named),
        mistake("empty", "", " ", **named),
        mistake("negative number", "-1", "-80GiB", **named),
        mistake("odd characters", "8\udcffGiB", "\x00", "80\n\nGiB\n!", **named),
        mistake("very long text", "x" * 100_000, "9" * 5000, **named),
        mistake("flag without a value", ALONE),
    ]


@cache
def folder() -> Path:
    """Makes a folder for files, which the end of the process removes."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def outputs(suffix: str = ".svg") -> list[Mistake]:
    """Mistakes in a flag for a file to write."""
    no_folder = folder() / "no" / "such" / f"x{suffix}"
    paths = (no_folder, f"/proc/x{suffix}", folder(), f"/dev/null/x{suffix}", "/", "/dev/full")
    return [
        mistake("unwritable path", *map(str, paths), "x" * 5000 + suffix),
        mistake("unknown suffix", *(f"{folder()}/x.{end}" for end in ("docx", "svgz", "htm"))),
        mistake("empty", ""),
        mistake("flag without a value", ALONE),
    ]


def folders() -> list[Mistake]:
    """Mistakes in a flag for a folder to write into, which is made if it is missing."""
    return [
        mistake("unwritable path", "/proc/x", "/dev/null/x", "/dev/null", __file__, "x" * 5000),
        mistake("flag without a value", ALONE),
    ]


def _file(name: str, content: bytes) -> str:
    path = folder() / name
    path.write_bytes(content)
    return str(path)


def _folder(name: str, **files: bytes) -> str:
    path = folder() / name
    path.mkdir(exist_ok=True)
    for inner, content in files.items():
        (path / inner).write_bytes(content)
    return str(path)


def texts_to_learn() -> list[Mistake]:
    """Mistakes in a text file, or a folder of them."""
    missing = ("/no/such/file", "/dev/null/x", "x" * 5000, str(folder() / "no"))
    return [
        mistake("unreadable path", *missing),
        mistake(
            "number far too small",
            _file("no text", b""),
            _file("few bytes", b"0123456789"),
            _folder("no texts"),
            _folder("no bytes", a=b"", b=b""),
            _folder("binary", a=b"\0" * 1000),
            also=("text",),
        ),
        mistake("flag without a value", ALONE),
        mistake("another form", _folder("texts", a=b"a" * 500, b=b"b" * 500), legal=always),
    ]


def folders_of_models() -> list[Mistake]:
    """Mistakes in the folder of a published model, before its weights are read."""

    def config(name: str, content: bytes) -> str:
        return _folder(name, **{"config.json": content})

    good = (model() / "config.json").read_bytes()
    return [
        mistake("unreadable path", "/no/such/folder", __file__, "/dev/null/x", "x" * 5000),
        mistake("empty", _folder("no model")),
        mistake(
            "malformed file",
            config("cut_config", good[:20]),
            config("no_text", b"\xff\xfe"),
            config("no_object", b"[1]"),
            config("deep_config", b"[" * 100_000),
            config("no_tokenizer", good),
            _folder("cut_tokenizer", **{"config.json": good, "tokenizer.json": b"{"}),
        ),
        mistake(
            "wrong type",
            config("layers_as_text", good.replace(b'layers": 4', b'layers": "4"')),
            config("half_layers", good.replace(b'layers": 4', b'layers": 4.5')),
            config("true_layers", good.replace(b'layers": 4', b'layers": true')),
            config("theta_as_text", good.replace(b"500000.0", b'"x"')),
        ),
        mistake("zero", config("no_layers", good.replace(b'layers": 4', b'layers": 0'))),
        mistake("missing key", config("no_key", b'{"model_type": "qwen3"}')),
        mistake("unknown name", config("other_model", good.replace(b"qwen3", b"gpt2"))),
        mistake("flag without a value", ALONE),
    ]


@cache
def model() -> Path:
    """Makes the folder of a small published model."""
    path = folder() / "published"
    make(path, model_type="qwen3")
    return path


def files_of_flags() -> list[Mistake]:
    """Mistakes in a file of flags."""

    def wrong(name: str, text: bytes, *also: str) -> Mistake:
        return mistake(name, _file(f"{name} {len(text)}.toml", text), also=also)

    return [
        mistake("unreadable path", "/no/such/file", str(folder()), "x" * 5000),
        wrong("non-UTF-8 file", b"\xff\xfe = 1"),
        wrong("malformed file", b"width = "),
        wrong("malformed file", b"width = 1\nwidth = 2"),
        wrong("unknown name", b"widht = 16", "widht"),
        wrong("unknown name", b"[model]\nwidth = 16", "model"),
        wrong("wrong type", b"steps = [1, 2]", "steps"),
        wrong("wrong type", b"steps = true", "steps"),
        wrong("float for an integer", b"steps = 1.5", "steps"),
        wrong("zero", b"keep = 0", "keep"),
        wrong("NaN", b"learning-rate = nan", "learning-rate"),
        wrong("infinite", b"learning-rate = inf", "learning-rate"),
        mistake("flag without a value", ALONE),
        mistake("another form", _file("good.toml", b"seed = 3\nlog = ['jsonl']"), legal=always),
    ]


def folders_of_runs() -> list[Mistake]:
    """Mistakes in the folder of a run: other flags, and a config that cannot be read."""
    return [
        mistake(
            "another run",
            _folder("other seed", **{"config.toml": b"seed = 12345"}),
            _folder("other text", **{"config.toml": b"text = 'other'"}),
        ),
        mistake(
            "malformed file",
            _folder("cut_run", **{"config.toml": b"seed = "}),
            _folder("bytes of no text", **{"config.toml": b"\xff\xfe"}),
            also=("config.toml",),
        ),
    ]


def costs_files() -> list[Mistake]:
    """Mistakes in a file of costs."""
    good = b'{"costs": {"forward": 1, "input_grad": 1, "weight_grad": 1}}'
    named = _flag("costs-from", "forward", "weight_grad")

    def with_forward(text: bytes) -> bytes:
        return good.replace(b'"forward": 1', b'"forward": ' + text)

    return [
        mistake(
            "unreadable path",
            "/no/such/file",
            str(folder()),
            "/dev/null/x",
            "",
            "x" * 5000,
            "\udcff",
            **named,
        ),
        mistake(
            "non-UTF-8 file",
            _file("bytes", b"\xff\xfe\x00{"),
            _file("latin", b'{"\xe9": 1}'),
            **named,
        ),
        mistake(
            "malformed file",
            _file("empty", b""),
            _file("cut", good[:20]),
            _file("text", b"x"),
            _file("deep", b"[" * 100_000),
            _file("list", b"[1]"),
            _file("null", b"null"),
            **named,
        ),
        mistake(
            "missing key",
            _file("none", b"{}"),
            _file("no_costs", b'{"costs": {}}'),
            _file("no_f", good.replace(b"forward", b"fore")),
            **named,
        ),
        mistake(
            "wrong type",
            _file("string", with_forward(b'"1"')),
            _file("costs", b'{"costs": 3}'),
            _file("true", with_forward(b"true")),
            _file("null_f", with_forward(b"null")),
            **named,
        ),
        mistake("NaN", _file("nan", with_forward(b"NaN")), **named),
        mistake("infinite", _file("inf", with_forward(b"Infinity")), **named),
        mistake("negative number", _file("negative", with_forward(b"-1")), **named),
        mistake("zero", _file("zero", with_forward(b"0")), **named),
        mistake(
            "number beyond all floats",
            _file("huge", with_forward(b"9" * 400)),
            _file("digits", with_forward(b"9" * 5000)),
            **named,
        ),
        mistake("flag without a value", ALONE),
        mistake("another form", _file("good", good), legal=always),
    ]


def costs_texts() -> list[Mistake]:
    """Mistakes in costs as text."""
    named = _flag("costs", "forward", "input_grad", "weight_grad", "full_backward")
    return [
        mistake("malformed text", "F", "F=", "F=1,", "F:1", "F=1;I=1", "=1", "F==1", **named),
        mistake("unknown name", "X=1", "f=1", "F=1,Z=2", **named),
        mistake("named twice", "F=1,F=1", "F=1,I=1,F=2", **named),
        mistake("text for a number", "F=one", "F=0x1", "F=1/2", **named),
        mistake("NaN", "F=nan", "W=nan", **named),
        mistake("infinite", "F=inf", "I=-inf", "W=1e400", **named),
        mistake("negative number", "F=-1", "I=-0.5", **named),
        mistake("zero", "F=0", "F=0,I=0,W=0", "F=1e-300", **named),
        mistake("number far too large", "F=1e300", "W=1e101", "B=1e200", **named),
        mistake("empty", "", " ", ",", **named),
        mistake("odd characters", "F=1\udcff", "\x00", "F=1\nI=2", **named),
        mistake("very long text", "F=1," * 20_000, "x" * 100_000, **named),
        mistake("flag without a value", ALONE),
    ]
