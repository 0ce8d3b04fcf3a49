"""Shows the pipeline that was found: the values that cross, are made again, or are shared."""

from collections.abc import Iterator

from dualpipe_jax._from_loss.cut import Cut
from dualpipe_jax._from_loss.free import Recipe
from dualpipe_jax._from_loss.values import Value, needed


def show_cut(cut: Cut) -> str:
    """Writes a pipeline in words, with the file and line of the user's model at each value."""
    return "\n".join(_lines(cut))


def _lines(cut: Cut) -> Iterator[str]:
    kinds = [
        f"{_name(cut, number)}{_ranges(sorted(kind.indices))} of {len(kind.first.nodes)} equations"
        for number, kind in enumerate(cut.kinds)
    ]
    plural = "" if len(kinds) == 1 else f", {len(kinds)} kinds"
    yield f"{cut.num_layers} layers{plural}: {'; '.join(kinds)}"
    total = sum(slot.num_bytes for slot in cut.slots.avals)
    yield f"crosses between layers, {total:,} bytes of a microbatch:"
    last = cut.num_layers
    for number, slot in enumerate(cut.slots.avals):
        yield f"  {slot.aval.str_short()}, {slot.num_bytes:,} bytes"
        for boundary in sorted({0, min(1, last), last}):
            name = "the head" if boundary == last else f"layer {boundary}"
            for at, value in cut.slots.before[boundary].items():
                if at == number:
                    yield f"    before {name}: {value}"
    for family in cut.families:
        yield f"  {len(family.values)} keys, one for each layer: {family.values[-1]}"
    yield from _made_again(cut)
    for number, kind in enumerate(cut.kinds):
        if kind.tables:
            places = ", ".join(sorted({node.where for node, _ in kind.tables}))
            yield (
                f"{_name(cut, number)}literals that differ by layer, in tables: "
                f"{len(kind.tables)} (at {places})"
            )
    yield from _outputs_of_layers(cut)
    on_host = {node.where for kind in cut.kinds for node in kind.first.nodes if node.calls_host}
    if on_host:
        yield f"functions on the host, taken to have no state: at {', '.join(sorted(on_host))}"
    if cut.shared:
        yield f"shared by layers: {', '.join(sorted(cut.shared))}"
    yield from cut.notes


def _made_again(cut: Cut) -> Iterator[str]:
    rows: dict[Value, str] = {}
    for number, recipes in enumerate(cut.recipes):
        for recipe in recipes:
            nodes = needed([recipe.value])
            if nodes and recipe.value not in rows:
                name = _name(cut, number)
                rows[recipe.value] = (
                    f"  {name}{recipe.value}: {len(nodes)} equations, {_how(recipe)}"
                )
    if rows:
        yield "made again in every block, of the microbatch and its key:"
        yield from rows.values()


def _how(recipe: Recipe) -> str:
    if recipe.is_same:
        return "the same in all layers"
    families = [
        f"of {len(family.values)} values in all, one chosen"
        for family in recipe.families.values()
        if not family.travels
    ]
    if any(family.travels for family in recipe.families.values()):
        families.append("of the layer's key")
    if recipe.tables or recipe.constants:
        families.append(f"{len(recipe.tables) + len(recipe.constants)} numbers by layer")
    return ", ".join(families)


def _outputs_of_layers(cut: Cut) -> Iterator[str]:
    for number, kind in enumerate(cut.kinds):
        losses = [str(t.value) for t in kind.first.terms if t.is_loss]
        metrics = [str(t.value) for t in kind.first.terms if not t.is_loss]
        if losses:
            yield f"{_name(cut, number)}losses of a layer: {', '.join(losses)}"
        if metrics:
            yield f"{_name(cut, number)}metrics of a layer: {', '.join(metrics)}"


def _name(cut: Cut, number: int) -> str:
    return "" if len(cut.kinds) == 1 else f"kind_{number}: "


def _ranges(indices: list[int]) -> str:
    """Writes indices, successive ones as a range.

    >>> _ranges([0, 1, 2, 5])
    '0 to 2, 5'
    """
    parts: list[tuple[int, int]] = []
    for index in indices:
        if parts and parts[-1][1] == index - 1:
            parts[-1] = (parts[-1][0], index)
        else:
            parts.append((index, index))
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in parts)
