"""The program that is being written: its choices so far, and the parts of its source."""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from experiments.fuzz_losses.features import EXTRAS, SLOTS

OWN = ("names", "list", "nested")
IN_PYTHON = (*OWN, "stack-indexed", "stack-listed", "stack-split", "stack-iterated")
BY_INDEX = ("scan-indices", "fori-index", "fori-dynamic")
FORI = ("fori-index", "fori-dynamic")


@dataclass(frozen=True, kw_only=True)
class PerLayer:
    """An argument that differs by layer.

    Attributes:
      name: The argument.
      item: Its expression for the layer `i`.
      stacked: Its expression for all layers, `[LAYERS, ...]`; None: made of a scanned index.
      traced: Its expression where `i` is traced; None: as `item`.
    """

    name: str
    item: str
    stacked: str | None = None
    traced: str | None = None


@dataclass(kw_only=True)
class Out:
    """A value of each layer beside the stream.

    Attributes:
      name: Its name in one layer; `many` names it over all.
      expression: How a loop makes it of the stream; None: the layer returns it.
      way: An option of the slot "auxiliary".
      is_running: Whether it is added up as layers run.
      factor: The factor with which it is added up.
    """

    name: str
    many: str
    expression: str | None
    way: str
    is_running: bool = False
    factor: str = ""


@dataclass(kw_only=True)
class Group:
    """Layers that run one after the other.

    Attributes:
      name: `params[name]`, or its beginning.
      count: The constant that says how many there are.
      width: The constant of their width.
      function: The layer's function.
      init: The function that makes a layer's parameters.
    """

    name: str
    count: str
    width: str
    function: str
    init: str


@dataclass
class Draft:
    """A program in the making.

    Attributes:
      random: The draws.
      choices: The option of each slot.
      extras: The extras.
      sizes: Numbers of layers, widths and so on, by the name of their constant.
      constants: Lines that set constants.
      helpers: Functions by name, in the order in which they are written.
      inits: The expressions of a layer's parameters, by their place in it.
      ends: The expressions of parameters outside of layers, by name.
      batch: The expressions of the batch's arrays, by name.
      setup: Lines of loss_fn ahead of the layers.
      closed: Arguments of a layer that are the same for all.
      per_layer: Arguments of a layer that differ.
      outs: Values of each layer beside the stream.
      first_leaves: Parameters that only the first layer has.
      wraps_in_loop: Whether `jax.checkpoint` or `jax.jit` is put on where layers run.
      is_in_params: Whether all parameters are in `params["params"]`.
    """

    random: random.Random
    choices: dict[str, str] = field(default_factory=dict)
    extras: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    constants: list[str] = field(default_factory=list)
    helpers: dict[str, str] = field(default_factory=dict)
    inits: dict[str, str] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    batch: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    per_layer: list[PerLayer] = field(default_factory=list)
    outs: list[Out] = field(default_factory=list)
    first_leaves: dict[str, str] = field(default_factory=dict)
    wraps_in_loop: bool = False
    is_in_params: bool = False

    def pick(self, slot: str, allowed: Collection[str] | None = None, without: str = "") -> str:
        """Draws an option of a slot, among those allowed and not in the words of `without`."""
        options = {
            name: weight
            for name, (weight, _) in SLOTS[slot].items()
            if (allowed is None or name in allowed) and name not in without.split()
        }
        self.choices[slot] = self.one_of(options)
        return self.choices[slot]

    def one_of(self, options: Mapping[str, float]) -> str:
        """Draws a key by its weight."""
        return self.random.choices(list(options), list(options.values()))[0]

    def draw(self, extra: str) -> bool:
        """Draws whether an extra comes in, with its probability."""
        if self.chance(EXTRAS[extra][0] / 100):
            self.extras.add(extra)
        return extra in self.extras

    def chance(self, share: float) -> bool:
        """Draws a yes with this probability."""
        return self.random.random() < share

    def has(self, *names: str) -> bool:
        """Whether any of these is an extra, or the option of a slot, of the program."""
        return any(name in self.extras or name in self.choices.values() for name in names)

    def close(self, *names: str) -> None:
        """Gives a layer arguments that are the same for all."""
        self.closed += [name for name in names if name not in self.closed]

    def constant(self, name: str, value: object) -> None:
        """Sets a constant of the module."""
        self.constants.append(f"{name} = {value}")

    @property
    def form(self) -> str:
        """How layers are stored and run."""
        return self.choices["layers"]

    @property
    def knows_index(self) -> bool:
        """Whether a layer's function can branch in Python on the number of its layer."""
        wrapped = self.has("checkpoint", "checkpoint-policy", "jit-layer")
        return self.form in IN_PYTHON and not wrapped

    @property
    def is_vmapped(self) -> bool:
        """Whether the model is one of a single row."""
        return self.has("vmap")

    def features(self) -> list[str]:
        """Names the features, as `features.names`."""
        return [f"{slot}/{option}" for slot, option in self.choices.items()] + sorted(self.extras)


def indent(lines: Collection[str], by: int = 1) -> list[str]:
    """Indents lines of code."""
    return [f"{'    ' * by}{line}" if line else line for line in lines]
