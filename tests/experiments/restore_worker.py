"""Restores a large state under a limit of memory: a process of `test_sharded_restore`.

In: the folder of checkpoints, the sharding (`sharded` or `whole`), and the flags of processes. Out:
a line of JSON: bytes of the state on this process, bytes read, bytes of memory taken, and how the
memory was limited. A process that takes more than the limit is killed by the kernel.
"""

import argparse
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.train_lm.trainer import processes
from experiments.train_lm.trainer.checkpoints import Checkpoints
from experiments.train_lm.trainer.state import State, digest

SHAPE = (16, 1024, 4096)  # 256 MiB of float32
MIB = 2**20
# Less than the state; more than three times a quarter: encoded, decoded and in place.
LIMIT = 240 * MIB


def make_state(sharding: NamedSharding | None) -> State:
    """Gives the state's shapes."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=None)
    if sharding is not None:
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    kernel = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=sharding)
    return State(step=scalar, params={"blocks": kernel}, opt_state=scalar, rng=scalar)


def main() -> None:
    """Runs the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("how", choices=["sharded", "whole"])
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 1)
    processes.start(given.coordinator, given.num_processes, given.process_id)
    mesh = jax.make_mesh((jax.device_count(),), ("pipe",))
    spec = PartitionSpec("pipe") if given.how == "sharded" else PartitionSpec()
    abstract = make_state(NamedSharding(mesh, spec))
    checkpoints = Checkpoints(given.folder, keep=1, warn=print)
    processes.wait_for_all("ready")
    digest(jnp.ones(8))  # a first program brings much along
    limit = limit_memory(LIMIT)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    read, memory = read_bytes(), status("VmRSS")
    restored = checkpoints.restore(abstract)
    assert restored is not None
    shards = restored.state.params["blocks"].addressable_shards
    figures = {
        "state": sum(shard.data.nbytes for shard in shards),
        "read": read_bytes() - read,
        "memory": status("VmHWM") - memory,
        "limit": limit,
    }
    print(json.dumps(figures), flush=True)


def limit_memory(limit: int) -> str:
    """Puts this process into a memory cgroup of its own; memory that it has so far is not counted.

    Returns:
      The kind of cgroup, or `none` where none can be made.
    """
    name = f"dualpipe-test-{os.getpid()}"
    for kind, root, file, members in (
        ("v1", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "cgroup.procs"),
        ("v2", "/sys/fs/cgroup", "memory.max", "cgroup.procs"),
    ):
        group = Path(root) / name
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
            (group / members).write_text(str(os.getpid()))
        except OSError:
            continue
        return kind
    return "none"


def read_bytes() -> int:
    """Counts the bytes that this process has read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def status(name: str) -> int:
    """Reads a figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
