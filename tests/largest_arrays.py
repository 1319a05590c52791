"""Runs a command of saejax and says how large an array it held: python -m tests.largest_arrays OUT [--file-bytes=N] ...

Of a device: the largest value in any program that was compiled, as the compiler's own reports give it, and the largest part of
any array that was alive. Of the host: the most that Python held, numpy's arrays included. Written to OUT as JSON.
"""

import json
import os
import re
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"\);\s*([\d.]+)(B|KiB|MiB|GiB);.*?;.*?; (.*)")


def compiled(folder: Path) -> dict[str, tuple[float, str]]:
    """By program, the bytes of its largest value on a device, and the shapes that lie there."""
    out: dict[str, tuple[float, str]] = {}
    for file in folder.glob("*memory-usage-report.txt"):
        found = [(float(n) * _UNITS[unit], shapes[:120]) for n, unit, shapes in _SIZE.findall(file.read_text())]
        name = file.name.split(".")[1]
        out[name] = max([*found, out.get(name, (0.0, ""))])
    return out


class Watch(threading.Thread):
    """Looks at the arrays that are alive, all the time."""

    def __init__(self):
        super().__init__(daemon=True)
        self.largest, self.shape, self.over = 0, "", threading.Event()

    def run(self) -> None:
        import jax
        while not self.over.wait(0.05):
            for x in jax.live_arrays():
                try:
                    size = max(shard.data.nbytes for shard in x.addressable_shards)
                except (RuntimeError, ValueError):  # deleted meanwhile
                    continue
                if size > self.largest:
                    self.largest, self.shape = size, f"{x.dtype}{list(x.shape)}"


def main() -> None:
    out, *words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        from saejax.formats import saelens
        if words[0].startswith("--file-bytes="):
            saelens.FILE_BYTES = int(words.pop(0).partition("=")[2])
        from saejax.cli.main import main as command
        tracemalloc.start()
        watch = Watch()
        watch.start()
        code = command(words)
        watch.over.set()
        watch.join()
        programs = compiled(Path(folder))
        where = max(programs, key=programs.get)
        found = {"host": tracemalloc.get_traced_memory()[1], "live": watch.largest, "live_shape": watch.shape,
                 "compiled": programs[where][0], "program": where, "value": programs[where][1], "programs": len(programs)}
        Path(out).write_text(json.dumps(found))
    sys.exit(code)


if __name__ == "__main__":
    main()
