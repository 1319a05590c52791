"""`python -m saejax.bench NAME OPTIONS PROCESSORS`: one benchmark of `saejax bench`; the last line of its output is JSON."""

import json
import os
import platform
import resource
import sys


def main(name: str, options: str, processors: str) -> None:
    """Holds itself on the processors before jax makes its threads."""
    if own := json.loads(processors):
        os.sched_setaffinity(0, own)
    import jax

    from saejax.base.errors import SaejaxError
    from saejax.bench.options import BenchOptions

    if name in ("selection", "step", "devices"):
        from saejax.bench import training as room
    else:
        from saejax.bench import pipeline as room
    figures = []
    try:
        for row in getattr(room, name)(BenchOptions(**json.loads(options))):
            print(f"{name}: {row['what']}: {row['median']:,.0f} {row['unit']}", file=sys.stderr, flush=True)
            figures.append(row)
    except SaejaxError as error:
        sys.exit(f"{name}: {error}")
    device = jax.devices()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    print(json.dumps({"figures": figures, "peak_bytes": peak, "backend": device.platform, "device": device.device_kind}))


if __name__ == "__main__":
    main(*sys.argv[1:])
