"""One rank in a process of its own: runs a task's programs beside the other ranks.

In: a Task as JSON, this rank, and the address of rank 0. Out, on stdout: from rank 0 a Measured as
a line of JSON for each program and costs; from any rank `{"error": text}` as its last line. It ends
when its stdin does, so that none outlives the driver, whatever ended that.
"""

import json
import os
import sys
import threading
import traceback
from typing import Any, TextIO

import jax

from experiments.by_the_clock import steps
from experiments.by_the_clock.tasks import Task, to_dict

_LONGEST = 2000  # characters of an error


def end_with_driver() -> None:
    """Ends this process as soon as its stdin ends, which the driver holds open."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def own_stdout() -> TextIO:
    """Takes stdout for the answers; anything else that is printed there is dropped."""
    answers = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # gloo prints from C++ that it is connected
    return answers


def main() -> None:
    """Runs the worker."""
    end_with_driver()
    answers = own_stdout()
    task, rank, address = Task.from_dict(json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3]

    def say(answer: dict[str, Any]) -> None:
        answers.write(f"{json.dumps(answer)}\n")
        answers.flush()

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, task.num_ranks, rank)
        for measured in steps.run(task):
            if rank == 0:
                say(to_dict(measured))
    except BaseException as error:
        traceback.print_exc()
        # Several ranks may fail at once: a longer line could mix with another's in the pipe.
        say({"error": f"rank {rank}: {type(error).__name__}: {error}"[:_LONGEST]})
        raise


if __name__ == "__main__":
    main()
