"""`saejax convert`: an SAE of any library -> the files of another one."""

from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.cli.options import Job, path, places, switch, value


@dataclass(frozen=True)
class Options:
    paths: tuple[str, ...] = places("SRC DST", "SRC DST --to=FORMAT", least=2, most=2)
    to: str | None = value("saelens, dictionary_learning, sparsify or gemma_scope", "FORMAT", required=True)
    approximate: bool = switch("topk for Gemma Scope: one threshold, of the same mean L0 on the rows")
    rows: Path | None = value("activations [N, d_in] on which that is fitted and measured", "FILE.npy", path)


def run(options: Options) -> int:
    """The job."""
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import array_of
    from saejax.formats.convert import convert
    if options.approximate != (options.rows is not None):
        raise ConfigError("saejax convert: --approximate and --rows=FILE.npy go together: the error is measured on those rows")
    source, directory = options.paths[0], Path(options.paths[1])
    cfg, compared = convert(source, directory, options.to, None if options.rows is None else array_of("rows", options.rows))
    if is_writer():
        print(f"converted {directory}: {options.to}, {cfg}\ncompared  {compared}")
    return 0


JOB = Job(
    "convert", "exchange", "an SAE of any library -> the files of another one", """
    Reads SRC: a run, a checkpoint step, a release, files of SAELens, sparsify, dictionary_learning, Gemma Scope, OpenAI,
    OpenMOSS or Goodfire, or org/repo:path of the Hugging Face hub; writes the directory DST, reads it back and compares. What
    the format cannot express exactly is refused with the reason (docs/how-to/other_libraries.md). For saelens the weights are one
    file; a release in several files is joined piece by piece.
    """, "saejax convert runs/demo my_sae --to=dictionary_learning", Options, run)
