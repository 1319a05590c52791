"""`saejax plan`: what a config needs on a pod."""

from dataclasses import dataclass

from saejax.base.errors import ConfigError
from saejax.cli.options import ConfigOptions, Job, Json, places, switch, value


@dataclass(frozen=True)
class Options(Json, ConfigOptions):
    paths: tuple[str, ...] = places("RUN_DIR", "a run directory")
    topology: str | None = value("v5e:8x8, v5p:4x8x8, v6e:16x16, h100:8x4 (GPUs per node x nodes), h200:8, cpu:8; without it "
                                 "only what fits is listed", "CHIPS")
    compile: bool = switch("compile the training step for a TPU topology (pip install 'saejax[tpu-plan]') or for cpu:N, and "
                           "report the compiler's memory and collectives")


def run(options: Options) -> int:
    """The job, of every config given."""
    from saejax import plan
    from saejax.cli.subjects import configs
    if options.compile and options.topology is None:
        raise ConfigError("saejax plan: --compile needs --topology, for example --topology=v5p:4x4x4")
    for config in configs(options):
        made = plan.make_plan(config, options.topology, compiled=options.compile)
        print(plan.as_json(made) if options.json else plan.as_table(made))
    return 0


JOB = Job(
    "plan", "operate", "what a config needs on a pod: memory, collectives, time", """
    Reads the config, and the width of the activations from config.sae.d_in, the store or the language model's config; writes
    nothing. Prints
    bytes per chip by kind, FLOPs, collectives, predicted step time and tokens/s, store and harvest, days for
    config.train.tokens, and the smallest topologies that fit. docs/explanation/plan_model.md has the model.
    """, "saejax plan --config=configs/smollm2_pod.py --topology=v5p:4x4x4", Options, run)
