"""One process of a training job for the multi-process and kill tests: `python -m tests.train.worker '{json}'`."""

import json
import os
import sys
from pathlib import Path


def main(options: dict) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(options["devices"])
    import faulthandler

    import jax
    faulthandler.dump_traceback_later(options.get("deadline", 150), exit=True)
    if options["processes"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{options['port']}", num_processes=options["processes"],
                                   process_id=options["process"], initialization_timeout=60, heartbeat_timeout_seconds=10,
                                   shutdown_timeout_seconds=15)
    from saejax.base.errors import EXIT_PREEMPTED, Preempted
    from saejax.base.fingerprints import fingerprints
    from saejax.data.store import Store
    from saejax.train import loop

    from .synthetic import make_config

    if options.get("slow_seconds"):  # uneven hosts: this process takes longer for every step
        import time
        step = loop._Log.step
        loop._Log.step = lambda self, n, m: (time.sleep(options["slow_seconds"]), step(self, n, m))[1]
    placed = []  # rows of activations that training reads, without the sample that it begins with
    stream = loop._Run.own_stream

    def counted(self, *args):
        from saejax.data.shards import ArrayReader
        place = ArrayReader._place_part
        ArrayReader._place_part = lambda reader, shard, a, b, *rest: (placed.append(b - a), place(reader, shard, a, b, *rest))
        return stream(self, *args)

    loop._Run.own_stream = counted
    config = make_config(options["kind"], Path(options["run_dir"]), **options.get("overrides", {}))
    try:
        trained = loop.train(config, Store.open(options["store"]))
    except Preempted as stop:
        print(f"PREEMPTED {stop}", flush=True)
        if options["processes"] > 1:
            jax.distributed.shutdown()
        sys.exit(EXIT_PREEMPTED)
    print(f"READ {sum(placed)}")
    print("FINGERPRINTS " + json.dumps(fingerprints(trained.state)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
