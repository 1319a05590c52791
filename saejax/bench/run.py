"""The job `saejax bench`: a process for every benchmark, JSON, tables, and the part of a page that holds them."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import jax
import numpy as np

from saejax.base.errors import ConfigError
from saejax.base.storage import write_bytes
from saejax.bench.options import BENCHMARKS, BenchOptions
from saejax.config.recipes import RECIPES
from saejax.config.values import nearest

BEGIN, END = "<!-- saejax bench: begin -->", "<!-- saejax bench: end -->"
_DEVICES = "--xla_force_host_platform_device_count"


def run(given: dict, threads: int | None, out: Path | None) -> dict:
    """Runs what is asked for and returns it as plain values; `out`: a Markdown page whose marked part is replaced.

    given: fields of `BenchOptions` that are not at their defaults. threads: processors that the benchmarks may use. Raises
    `ConfigError` for a benchmark, kind or page that does not exist, and where a benchmark fails.
    """
    options = replace(BenchOptions(), **given)
    names = options.only.split(",")
    for key, values, known in (("only", names, BENCHMARKS), ("kind", options.kinds, RECIPES)):
        for value in values:
            if value not in known:
                near = nearest(value, known)
                hint = f"did you mean {near!r}?" if near else f"choose of {', '.join(known)}"
                raise ConfigError(f"--{key}={getattr(options, key)}: there is no {value!r}; {hint}")
    if not all(n.isdecimal() and int(n) for n in options.devices.split(",")):
        raise ConfigError(f"devices={options.devices}: expected numbers of devices, as 1,2,4,8")
    page = None if out is None else _page(out)
    processors = _processors(threads)
    results = {name: _measured(name, options, processors) for name in names}
    machine = _machine(len(processors) or os.cpu_count(), next(iter(results.values())))
    result = {"machine": machine, "command": _command(given, threads, out), "options": options.to_json(),
              "results": results}
    if out is not None:
        before, after = page
        write_bytes(out, f"{before}{BEGIN}\n{markdown(result)}\n{END}{after}".encode())
    return result


def _processors(threads: int | None) -> list[int]:
    """Those that a benchmark may use; empty where the system does not tell."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if threads is not None and threads > len(mine):
        raise ConfigError(f"threads={threads}: a process can be held on {len(mine)} processors here")
    return mine[:threads]


def _measured(name: str, options: BenchOptions, processors: list[int]) -> dict:
    env = dict(os.environ)
    # This saejax, whatever lies in the directory from which the command is called.
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
    if name == "devices" and _DEVICES not in env.get("XLA_FLAGS", ""):  # of no effect where there are real ones
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {_DEVICES}={max(options.device_counts)}".strip()
    command = [sys.executable, "-P", "-m", "saejax.bench", name, json.dumps(options.to_json()), json.dumps(processors)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(f"saejax bench: {name} ended with exit code {done.returncode}; its own messages are above")
    return json.loads(done.stdout.splitlines()[-1])


def _machine(processors: int, result: dict) -> dict:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processors": processors, "architecture": platform.machine(), "memory_gib": round(memory / 2**30),
            "backend": result["backend"], "device": result["device"], "python": platform.python_version(),
            "jax": jax.__version__, "numpy": np.__version__}


def _command(given: dict, threads: int | None, out: Path | None) -> str:
    """As it can be typed again; options in the order in which they are documented."""
    order = [field.name for field in fields(BenchOptions)]
    more = {"threads": threads, "out": out}
    return shlex.join(["saejax", "bench", *(f"--{name}={given[name]}" for name in order if name in given),
                       *(f"--{name}={value}" for name, value in more.items() if value is not None)])


def _page(out: Path) -> tuple[str, str]:
    """What stands before and behind the marked part. Raises `ConfigError` for a file that has none, before anything is run."""
    if not out.exists():
        return "# Benchmarks\n\n", "\n"
    text = out.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"out={out}: has no part between {BEGIN!r} and {END!r} to replace; add these two lines, or choose "
                          "another file")
    return text[:text.index(BEGIN)], text[text.index(END) + len(END):]


def markdown(result: dict) -> str:
    """Machine, command and a table for every benchmark."""
    m, o = result["machine"], result["options"]
    lines = [f"{m['processors']} processors ({m['architecture']}), {m['memory_gib']} GiB; {m['backend']} ({m['device']}), jax "
             f"{m['jax']}, numpy {m['numpy']}, Python {m['python']}. {o['d_in']:,} to {o['d_sae']:,} features, batch "
             f"{o['batch']:,}, k = {o['k']}. Medians of {o['repeats']} repeats and their quartiles, without compilation and "
             "warm-up.", "", f"    {result['command']}", ""]
    for name, measured in result["results"].items():
        simulated = " Simulated devices share the processors: this shows what splitting costs, not what it gains." if (
            name == "devices" and measured["backend"] == "cpu") else ""
        lines += [f"**{name}**: {BENCHMARKS[name]}. Peak memory {measured['peak_bytes'] / 2**30:.2f} GiB.{simulated}", ""]
        lines += [*_table(measured["figures"]), ""]
    return "\n".join(lines)


def _table(figures: list[dict]) -> list[str]:
    timed = "ms" in figures[0]
    return ["| what | median | quartiles |" + " each | first call |" * timed, "|---|---|---|" + "---|---|" * timed,
            *(f"| {row['what']} | {row['median']:,.0f} {row['unit']} | {row['low']:,.0f} to {row['high']:,.0f} |"
              + (f" {row['ms']:,.2f} ms | {row['first_call_s']:.1f} s |" if timed else "") for row in figures)]
