"""Everything that is worth measuring on a GPU, in two calls of a few minutes each.

    python benchmarks/gpu.py steps [--seconds=280] [--only=topk-131k,products] [--peer-path=DIR] [--out=DIR] [--tiny]
    python benchmarks/gpu.py world --kind=matryoshka [--seconds=330] [--samples=200000000] [--batch=2048] [--set=KEY=VALUE]

steps: whole training steps of saejax in bfloat16, of eai-sparsify (its Triton kernels and its own bfloat16 autocast, fused Adam,
clipping) and of a dense topk step in plain torch, at the same shapes on the same card in the same call; above them the rates of
plain products and copies, and whether compiler flags bring JAX's product closer to torch's. Selection by itself as well. Every
figure is the median of several repeats. After each of saejax's steps the kernels that it spends most time in, from a trace.

world: the synthetic world of 16,384 features in 768 dimensions, sampled and trained on the device for one kind, and its scores
beside the published ones. The time of a step is measured first; from it follows the number of steps, and so the learning rate's
schedule, with which the scores are there within --seconds.

Flags of both: --seconds is a hard limit; what does not fit is left out with a line that says so. --out (the environment's OUT
where that is set) is the directory of gpu.jsonl, to which every row is appended as soon as it is measured. --tiny: a size for any
machine, to try the script itself. --list (steps): the names that --only takes; the name of a case stands for both sides.

Every section runs in a process of its own, so that a failure, or memory that runs out, costs that section only. A call that is
ended by SIGTERM or Ctrl-C prints the table of what it has.

Packages that a machine lacks: PYTHONPATH holds what saejax needs; --peer-path names directories for the processes of the peers,
of unpacked packages (`pip install --no-deps --target=DIR eai-sparsify ...`) or of wheels (`pip download`), which are unpacked for
the call. A peer that cannot be imported is a line of the table and no error.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

from gpu_cases import CASES, Section, sections

HERE = Path(__file__).resolve().parent
LEFT = 3.0  # seconds at the end for the table
MEMORY = "0.92"  # share of the card that JAX may take


class Report:
    """Rows as they come: printed, appended to a file, kept for the table at the end."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self.file, self.rows, self.machine, self.started = directory / "gpu.jsonl", [], {}, time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def add(self, section: str, row: dict) -> None:
        """A row, or what a process says about its machine."""
        new = row.get("machine", {}).items() - self.machine.items()
        self.machine |= dict(new)
        if "machine" not in row:
            self.rows.append(row | {"section": section})
            self.say(f"{section}: {line(row)}")
        elif new:
            self.say(", ".join(f"{name} {value}" for name, value in sorted(new)))
        with open(self.file, "a") as file:
            file.write(json.dumps(row | {"section": section, "card": self.machine.get("card"), "at": time.time()}) + "\n")

    def product(self) -> float | None:
        """JAX's best bfloat16 product of this call, TF/s, without flags of its own."""
        return max((row["tflops"] for row in self.rows if "tflops" in row and "flags" not in row
                    and row["what"].startswith("jax product, bfloat16")), default=None)

    def table(self) -> str:
        """Markdown of all rows: card and versions, ceilings, selection, steps."""
        card = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        parts = [f"{card or 'nothing measured'}"]
        plain = [row for row in self.rows if row["section"].split("-")[0] in ("products", "torch", "trial", "selection")]
        if plain:
            parts.append("| what | ms | quartiles | rate |\n|---|---|---|---|\n" + "\n".join(map(plain_row, plain)))
        steps = [row for row in self.rows if row not in plain and row["what"] != "kernels"]
        if steps:
            head = ("workload", "side", "ms", "quartiles", "rows/s", "eai-sparsify's ms / ms", "TF/s", "of JAX's product", "GB",
                    "first, s")
            parts.append(f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|\n" + "\n".join(map(self.step_row, steps)))
        return "\n\n".join(parts)

    def step_row(self, row: dict) -> str:
        """TF/s: of 10BDF on the dense path, of the encoder's 2BDF on the sparse one."""
        side = f"{row['what']}, {row['path']}" if row["what"] == "saejax" else row["what"]
        dead = f", {row['dead']:.0%} dead" if "dead" in row else ""
        cells = [f"{row['section'].split(':')[0]}: {row['kind']} {row['shape']}{dead}", f"{side}, {row['dtype']}"]
        if "ms" not in row:
            return f"| {' | '.join(cells)} | {row['failed'].replace('|', '/')} | | | | | | | |"
        best, tflops = self.product(), row.get("tflops")
        cells += [f"{row['ms']:.2f}", quartiles(row), f"{1e3 * row['rows'] / row['ms']:,.0f}", self.ratio(row)]
        cells += [f"{tflops:.3g}" if tflops else "", f"{tflops / best:.0%}" if tflops and best else ""]
        cells += [f"{row['peak_gb']:.1f}" if row.get("peak_gb") else "", f"{row['first_s']:.1f}"]
        return f"| {' | '.join(cells)} |"

    def ratio(self, row: dict) -> str:
        """How many times faster than eai-sparsify's topk step: of the same case, else of the same shape."""
        peers = {other["section"].split(":")[0]: other["ms"] for other in self.rows
                 if other["what"] == "eai-sparsify" and other["shape"] == row["shape"] and "ms" in other}
        other = peers.get(row["section"].split(":")[0], next(iter(peers.values()), None))
        return f"{other / row['ms']:.2f}" if other else ""


def quartiles(row: dict) -> str:
    return f"{row['low']:.2f} to {row['high']:.2f}"


def rate(row: dict) -> str:
    if "equal" in row:
        return "yes" if row["equal"] else "NO"
    return next((f"{row[key]:.3g} {unit}" for key, unit in (("tflops", "TF/s"), ("tb_s", "TB/s")) if key in row), "")


def plain_row(row: dict) -> str:
    what = ", ".join(str(part) for part in (row["what"], row.get("shape"), row.get("flags")) if part)
    if "failed" in row:
        return f"| {what} | {row['failed'].replace('|', '/')} | | |"
    return f"| {what} | {row['ms']:.3f} | {quartiles(row)} | {rate(row)} |" if "ms" in row else f"| {what} | | | {rate(row)} |"


def line(row: dict) -> str:
    """A row in plain words."""
    names = ("what", "path", "kind", "shape", "dtype", "flags")
    what = ", ".join(str(row[name]) for name in names if row.get(name))
    if "failed" in row:
        return f"{what}: FAILED: {row['failed']}"
    if "kernels" in row:
        return what + "".join(f"\n    {ms:8.3f} ms {calls:6.1f} calls  {name[:90]}" for name, ms, calls in row["kernels"])
    time_ = f"{row['ms']:.3f} ms ({quartiles(row)}), first {row['first_s']:.1f} s" if "ms" in row else ""
    return f"{what}: " + ", ".join(part for part in (time_, rate(row)) if part)


def unpacked(paths: list[str], to: str) -> list[str]:
    """The directories, and for each one that holds wheels what these unpack to."""
    out = []
    for number, path in enumerate(paths):
        wheels = sorted(Path(path).glob("*.whl"))
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(f"{to}/{number}")
        out.append(f"{to}/{number}" if wheels else str(Path(path).absolute()))
    return out


def environment(section: Section, peer_path: list[str]) -> dict[str, str]:
    env = dict(os.environ)
    paths = [*peer_path, str(HERE.parent)] if section.script == "gpu_torch.py" else [str(HERE.parent)]
    env["PYTHONPATH"] = os.pathsep.join([*paths, env.get("PYTHONPATH", "")])
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    if section.flags:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {section.flags}".strip()
    return env


def run(name: str, section: Section, args, report: Report, limit: float) -> None:
    """Starts a section and takes its rows until it ends or `limit` seconds are over."""
    command = [args.peer_python if section.script == "gpu_torch.py" else sys.executable, str(HERE / section.script), section.what]
    command += ["--case", section.case] * bool(section.case) + ["--tiny"] * args.tiny
    command += [f"--flags={section.flags}"] * bool(section.flags)
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, env=environment(section, args.paths), stdout=subprocess.PIPE, stderr=said, text=True)

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            for text in process.stdout:
                report.add(name, json.loads(text))
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if process.returncode:
            said.seek(0)
            last = ([text for text in said.read().splitlines() if text.strip()] or ["no message"])[-1][:200]
            report.say(f"{name}: " + (f"ended after {limit:.0f} s" if late.is_set() else f"FAILED: {last}"))


def steps(args) -> None:
    """Sections in order of importance; the table also when the call is ended early."""
    report, known = Report(args.out), sections(args.tiny)
    wanted = {name: section for name, section in known.items()
              if not args.only or {name, section.case} & set(args.only.split(","))}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory() as directory:
            args.paths = unpacked(args.peer_path, directory)
            for name, section in wanted.items():
                left = args.seconds - LEFT - (time.monotonic() - report.started)
                if left < section.seconds:
                    report.say(f"{name}: left out, {left:.0f} s are left and it takes about {section.seconds}")
                    continue
                run(name, section, args, report, min(left, max(60.0, 2.5 * section.seconds)))
    finally:
        print(f"\n{report.table()}\n", flush=True)
        report.say(f"rows are in {report.file}")


def arguments() -> argparse.Namespace:
    out = Path(os.environ.get("OUT", "runs/gpu"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--out", type=Path, default=out, help=f"directory of gpu.jsonl ({out})")
    both.add_argument("--tiny", action="store_true", help="a size for any machine")
    of_steps = commands.add_parser("steps", parents=[both], help="step times beside the peers'")
    of_steps.add_argument("--seconds", type=float, default=280, help="of the whole call (280)")
    of_steps.add_argument("--only", default="", help="names with commas between; --list prints them")
    of_steps.add_argument("--list", action="store_true", help="print the names of the sections and end")
    of_steps.add_argument("--peer-path", nargs="*", default=[], metavar="DIR", help="packages or wheels of the peers")
    of_steps.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch (this one)")
    of_world = commands.add_parser("world", parents=[both], help="scores in the synthetic world beside the published ones")
    of_world.add_argument("--kind", required=True, choices=("matryoshka", "batchtopk", "topk", "jumprelu", "relu", "gated"))
    of_world.add_argument("--seconds", type=float, help="of the whole call, scores included (330; --tiny 60)")
    of_world.add_argument("--samples", type=int, default=200_000_000, help="at most so many rows")
    of_world.add_argument("--batch", type=int, default=0, help="rows of a step (2048; --tiny 512)")
    of_world.add_argument("--seed", type=int, default=0, help="of the SAE; the world's is 42")
    of_world.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                          help="a key of the config, as train.compute_dtype=float32")
    args = parser.parse_args()
    args.seconds = args.seconds or (60 if args.tiny else 330)
    if args.command == "steps" and args.only:
        known = {*sections(args.tiny), *CASES}
        if unknown := set(args.only.split(",")) - known:
            parser.error(f"--only: {', '.join(sorted(unknown))}: choose of {', '.join(sorted(known))}")
    return args


def main() -> None:
    args = arguments()
    if args.command == "world":
        import gpu_world
        gpu_world.world(args)
    elif args.list:
        for name, section in sections(args.tiny).items():
            shape = CASES[section.case].shape if section.case else ""
            print(f"{name:24} about {section.seconds:3} s  {section.flags or shape}")
    else:
        steps(args)


if __name__ == "__main__":
    main()
