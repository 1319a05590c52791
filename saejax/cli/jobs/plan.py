"""`saejax plan`: what a config needs on a pod."""

from dataclasses import dataclass

from saejax.base.errors import ConfigError
from saejax.cli.options import ConfigOptions, Job, Json, number, places, refuse, sizes, switch, value, words


@dataclass(frozen=True)
class Options(Json, ConfigOptions):
    paths: tuple[str, ...] = places("RUN_DIR", "a run directory")
    topology: str | None = value("v5e:8x8, v5p:4x8x8, v6e:16x16, h100:8x4 (GPUs per node x nodes), h200:8, cpu:8; without it "
                                 "only what fits is listed", "CHIPS")
    compile: bool = switch("compile the training step for a TPU topology (pip install 'saejax[tpu-plan]') or for cpu:N, and "
                           "report the compiler's memory and collectives")

    budget: str | None = value("what to train for so much: FLOPs as 1e20; on --topology time as 24h, 3d, 90m, or money as 500usd "
                               "with --price; takes --law", "BUDGET")
    law: tuple[str, ...] | None = value("files of points of a scaling study (points.json, scaling.json), with commas between",
                                        "FILES", words)
    price: float | None = value("what a chip costs for an hour", "PRICE", number)
    compute: str = value("which FLOPs the law, and a budget of FLOPs, are over", "KIND", default="dense",
                         choices=("dense", "sparse"))
    leave_out: tuple[int, int] | None = value("runs with at least so many of both do not count for the law; 0: any number",
                                              "FEATURES,TOKENS", sizes)


def run(options: Options) -> int:
    """The job, of every config given."""
    from saejax import plan
    from saejax.cli.subjects import configs
    if options.compile and options.topology is None:
        raise ConfigError("saejax plan: --compile needs --topology, for example --topology=v5p:4x4x4")
    if (options.budget is None) != (options.law is None):
        given, lacks = ("--law", "--budget=24h") if options.budget is None else ("--budget", "--law=RUN_DIR/points.json")
        raise ConfigError(f"saejax plan: {given} needs the other one, too; add {lacks}")
    if options.budget is None:
        refuse("plan", options, ("price", "compute", "leave_out"), "without a budget")
    else:
        refuse("plan", options, ("compile",), "with a budget")
    for config in configs(options):
        if options.budget is None:
            made, as_table = plan.make_plan(config, options.topology, compiled=options.compile), plan.as_table
        else:
            made, as_table = _for_budget(config, options), plan.budget_table
        print(plan.as_json(made) if options.json else as_table(made))
    return 0


def _for_budget(config, options: Options) -> dict:
    """What to train for the budget."""
    from saejax import plan
    from saejax.scaling.points import named_apart, read_points
    points = named_apart((file, read_points(file)) for file in options.law)
    return plan.recommend(config, points, plan.read(options.budget), topology=options.topology, price=options.price,
                          compute=options.compute, leave_out=options.leave_out)


JOB = Job(
    "plan", "operate", "what a config needs on a pod: memory, collectives, time", """
    Reads the config, and the width of the activations from config.sae.d_in, the store or the language model's config; writes
    nothing. Prints
    bytes per chip by kind, FLOPs, collectives, predicted step time and tokens/s, store and harvest, days for
    config.train.tokens, and the smallest topologies that fit. docs/explanation/plan_model.md has the model.

    With --budget and --law it says what to train for so much, by the law that was fitted to the points: features, steps, tokens
    and learning rate, with 90 % intervals and by how many decades that is extrapolated. docs/how-to/plan.md has an example.
    """, "saejax plan --config=configs/smollm2_pod.py --topology=v5p:4x4x4", Options, run)
