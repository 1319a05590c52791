"""`saejax bench`: how fast this machine trains, reads and harvests."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from saejax.bench.options import BenchOptions
from saejax.cli.options import Job, Json, count, path, places, refuse, value

_D = BenchOptions()
_USERS = {("kind", "compute_dtype"): ("step", "devices"), ("batch", "d_sae", "k", "steps"): ("selection", "step", "devices"),
          ("d_in",): ("step", "devices", "writer", "reader"), ("devices",): ("devices",), ("megabytes",): ("writer", "reader"),
          ("model", "source"): ("tokens", "harvest"), ("hookpoint", "tokens"): ("harvest",)}  # options of some benchmarks only


@dataclass(frozen=True)
class Options(Json):
    paths: tuple[str, ...] = places("", "", least=0, most=0)
    only: str = value("selection, step (dense, sparse path), devices, tokens, writer, reader, harvest", "NAMES", default=_D.only)
    kind: str = value("recipes of the training steps; devices takes the first", "RECIPES", default=_D.kind)
    d_in: int = value("width of the activations, of writer and reader too", "N", count, default=_D.d_in)
    d_sae: int = value("features", "N", count, default=_D.d_sae)
    batch: int = value("rows of a step", "N", count, default=_D.batch)
    k: int = value("active features of a row", "N", count, default=_D.k)
    steps: int = value("steps of a repeat", "N", count, default=_D.steps)
    repeats: int = value("repeats", "N", count, default=_D.repeats)
    compute_dtype: str = value("of the products", "DTYPE", default=_D.compute_dtype, choices=("auto", "float32", "bfloat16"))
    devices: str = value("numbers of devices, one after the other; on a CPU simulated ones", "LIST", default=_D.devices)
    threads: int | None = value("processors to use (default: all that this process may use)", "N", count)
    megabytes: int = value("of the store that is written or read", "N", count, default=_D.megabytes)
    model: str = value("language model that is harvested, or whose tokenizer is used", "MODEL", default=_D.model)
    source: str = value("text that is harvested or tokenised", "TEXT", default=_D.source)
    hookpoint: str = value("where", "NAME", default=_D.hookpoint)
    tokens: int = value("of a repeat of the harvest", "N", count, default=_D.tokens)
    out: Path | None = value("write the tables between the marks of this page, or to a new one", "FILE.md", path)


def run(options: Options) -> int:
    """The job."""
    from saejax.bench import run as bench
    only = set(options.only.split(","))
    for names, users in _USERS.items():
        if not only & set(users):
            refuse("bench", options, names, f"without {' or '.join(users)} in --only")
    given = {name: value for name, value in asdict(options).items() if hasattr(_D, name) and value != getattr(_D, name)}
    result = bench.run(given, options.threads, options.out)
    print(json.dumps(result) if options.json else bench.markdown(result))
    return 0


JOB = Job(
    "bench", "operate", "how fast this machine trains, reads and harvests", """
    Reads the language model where harvest is asked for; writes nothing but, with --out, a page. Runs each benchmark in a
    process of its own and prints a table, or JSON: medians and quartiles of the repeats, peak memory, the machine's class, the
    command. Nothing else should run meanwhile.
    """, "saejax bench --only=step --d-sae=65536 --batch=512", Options, run)
