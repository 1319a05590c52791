"""`saejax scaling`: a grid of SAEs, and the laws through what they reach."""

from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import ConfigError, ScalingError
from saejax.cli.options import ConfigOptions, DistributedOptions, Job, count, path, places, refuse, sizes, switch, value, words

_TRAINING = ("limit", "epochs")


@dataclass(frozen=True)
class Options(ConfigOptions, DistributedOptions):
    paths: tuple[str, ...] = places("RUN_DIR", "the run directory of a study", least=0, most=1)
    points: tuple[str, ...] | None = value("train nothing, fit these files of points (points.json, scaling.json), with commas "
                                           "between", "FILES", words)
    limit: int | None = value("train at most so many runs that have no point yet, the shortest first", "N", count)
    epochs: bool = switch("the store is shorter than the longest run, and several epochs of it are meant")
    compute: str = value("which FLOPs the laws are over", "KIND", default="dense", choices=("dense", "sparse"))
    leave_out: tuple[int, int] | None = value("hold runs with at least so many of both out of the fit, and compare them with "
                                              "what it predicts; 0: any number", "FEATURES,TOKENS", sizes)
    predict: tuple[int, int] | None = value("the loss that the laws predict for one run", "FEATURES,TOKENS", sizes)
    out: Path | None = value("where the report is written (default RUN_DIR; with --points: nowhere)", "DIR", path)


def run(options: Options) -> int:
    """The job. Raises `ScalingError` where points are only read and nothing can be fitted to them."""
    from saejax.base.storage import is_writer
    from saejax.scaling.study import study
    points, out = _points(options)
    if not is_writer():
        return 0
    found = study(points, compute=options.compute, leave_out=options.leave_out)
    _say(found, options)
    some = found.laws or found.rates or found.topk
    if some and out is not None:
        from saejax.pages.scaling import write_scaling
        print(f"\nreport   {write_scaling(out, found)}")
    if found.refused and options.points and not some:
        raise ScalingError("; ".join(found.refused))
    for line in found.refused:
        print(f"\n{line}")
    return 0


def _points(options: Options) -> tuple[list, Path | None]:
    """(the points, where the report goes)."""
    if options.points:
        from saejax.scaling.points import named_apart, read_points
        if options.config is not None or options.paths:
            raise ConfigError("saejax scaling: got both --points and a study to train; give one of them")
        refuse("scaling", options, _TRAINING, "where points are only read")
        return named_apart((file, read_points(file)) for file in options.points), options.out
    from saejax.cli.subjects import configs
    from saejax.runs.scaling import measured_points
    found = configs(options)
    if not found:
        raise ConfigError(f"saejax scaling: give --config=FILE, RUN_DIR or --points=FILES, for example: {JOB.example}")
    [config] = found
    points = measured_points(config, limit=options.limit, epochs=options.epochs)
    return points, options.out or Path(config.run_dir)


def _say(found, options: Options) -> None:
    from saejax.pages.scaling import caveats, held_table, laws_table, left_out, points_table, surface_table
    print(points_table(found.points, options.compute))
    if found.laws is not None or found.rates is not None:
        print(f"\n{laws_table(found)}")
    if found.topk is not None:
        print(f"\n{surface_table(found.topk.parameters)}")
    if found.held:
        print(f"\n{held_table(found.held)}")
    if options.predict:
        print(f"\n{_prediction(found, *options.predict)}")
    for line in caveats(found)[len(found.refused):] if found.laws or found.topk else []:
        print(f"note     {line}")
    for fit, what, why in left_out(found):
        print(f"left out {fit}: {what}: {why}")


def _prediction(found, features: int, tokens: int) -> str:
    """One line: the loss of a run, and how far it lies outside of what was fitted."""
    if found.laws is None:
        return f"no prediction for {features:,} features and {tokens:,} tokens: there are no laws"
    steps = tokens / found.used[0].batch
    e, names = found.laws.predict(features, steps), ("the fitted budgets", "their sizes", "their lengths")
    beyond = zip(names, found.decades(features, steps).values(), strict=True)
    outside = ", ".join(f"{what} by {decades:.1f}" for what, decades in beyond if decades)
    where = f"outside of {outside} powers of ten" if outside else "inside the fitted budgets, sizes and lengths"
    return f"{features:,} features, {tokens:,} tokens: loss {e.value:.4g} ({e.low:.4g} to {e.high:.4g}), {where}"


JOB = Job(
    "scaling", "make", "a grid of SAEs, and the laws through their losses", """
    Reads a config with a sweep over sae.d_sae and train.tokens (docs/how-to/scaling.md); harvests once, trains every SAE with its
    own whole schedule, measures all on held-out text, and fits laws of the loss over features, steps and compute. Into
    RUN_DIR it writes points.json, scaling.html, scaling.json, points.csv and the figures; each SAE has a run directory below it.
    Prints the points, exponents with 90 % intervals, and what the laws do not say.

    A run that has a point is not touched again: the same command goes on where it stopped, and a grid can grow. Where no laws can
    be fitted, the points are kept and the last line says why. Several learning rates at several sizes give a law of the learning
    rate, too; several k at several sizes give a surface of the loss over features and k.
    """, "saejax scaling --config=configs/scaling_smollm2.py --predict=16384,4e6", Options, run)
