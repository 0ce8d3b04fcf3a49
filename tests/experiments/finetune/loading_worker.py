"""Loads a published model as one process of several: a process of `outside_finetune`.

In: the folder, and the flags of processes. Out: a line of JSON: the layers of which this process
opened tensors, bytes of the model on its device, bytes of the whole, and the most bytes of memory
that reading took, without the pages of files.
"""

import argparse
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.finetune import families
from experiments.finetune.model import Model
from experiments.finetune.weights import Folder, Weights
from experiments.train_lm.trainer import processes


def main() -> None:
    """Runs the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 1)
    processes.start(given.coordinator, given.num_processes, given.process_id)
    with processes.leaving():
        load(given.folder)


def load(path: Path) -> None:
    """Loads the model, and prints the figures."""
    mesh = jax.make_mesh((jax.device_count(),), ("pipe",))
    published = families.read(path)
    model = Model(published, dtype=jnp.dtype("float32"), lora=None, rows=1, length=9)
    folder = Folder(path)
    opened: set[str] = set()
    most, read = 0, folder.read

    def watched(name: str, *args: object) -> object:
        nonlocal most
        opened.add(name)
        most = max(most, _memory() - before)
        return read(name, *args)  # pyrefly: ignore[bad-argument-type]

    weights = Weights(folder, published, model.own)
    folder.read = watched  # pyrefly: ignore[bad-assignment]
    shapes = model.placed(mesh, model.shapes, model.specs(mesh))
    before = _memory()
    params = weights.load(shapes)
    most = max(most, _memory() - before)
    leaves = jax.tree.leaves(params)
    layers = [re.match(r"model\.layers\.(\d+)\.", name) for name in opened]
    figures = {
        "layers": sorted({int(found[1]) for found in layers if found}),
        "held": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
        "whole": sum(leaf.nbytes for leaf in leaves),
        "memory": most,
    }
    print(json.dumps(figures), flush=True)


def _memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
