"""Runs the Python code of pages: those named, or the README and all pages beside this file.

A block that begins with an import is a script, to which the next blocks belong. Each script runs
in a process of its own, in an empty folder, and must end without an error.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DOCS = Path(__file__).resolve().parent
_BLOCK = re.compile(r"^```(?:python|\{code-cell\} ipython3)\n(.*?)^```", flags=re.M | re.S)
_TAGS = re.compile(r"\A(?::\w+:.*\n)+")


def scripts(page: str) -> Iterator[str]:
    """Yields the scripts of a page."""
    found: list[str] = []
    for block in _BLOCK.findall(page):
        code = _TAGS.sub("", block)
        is_new = code.startswith(("import ", "from ")) and "IPython" not in code
        if found and is_new:
            yield "\n".join(found)
            found = []
        found.append(code)
    if found:
        yield "\n".join(found)


def run(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True
        )


def main() -> None:
    """Runs them, as many at once as there are cores, and ends with 1 if one fails."""
    pages = [Path(name) for name in sys.argv[1:]] or [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    found = {
        f"{page.name}, script {number}": script
        for page in sorted(pages)
        for number, script in enumerate(scripts(page.read_text()), start=1)
    }
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, done in zip(found, pool.map(run, found.values()), strict=True):
            failed += done.returncode != 0
            print(f"{name}: {'failed' if done.returncode else 'runs'}", flush=True)
            if done.returncode:
                print(done.stderr[-2000:])
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
