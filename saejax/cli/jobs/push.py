"""`saejax push-to-hub`: a release -> a Hugging Face repository."""

from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import Job, places, switch, value


@dataclass(frozen=True)
class Options:
    paths: tuple[str, ...] = places("RELEASE", "one release directory and --repo=ORG/NAME", most=1)
    repo: str | None = value("the repository", "ORG/NAME", required=True)
    license: str | None = value("licence of the weights as the hub spells it, e.g. apache-2.0", "ID")
    yes: bool = switch("upload")


def run(options: Options) -> int:
    """The job."""
    from saejax.base.storage import is_writer
    from saejax.formats.publish import publish
    said = publish(Path(options.paths[0]), options.repo, options.license, upload=options.yes)
    if is_writer():
        print(said if options.yes else f"{said}; --yes does it")
    return 0


JOB = Job(
    "push-to-hub", "exchange", "a release -> a Hugging Face repository; says what it would do unless --yes", """
    Reads and verifies a release directory; without --yes it lists what it would upload and writes nothing. With --yes it makes
    the repository where there is none and writes cfg.json, the weights, metrics.json and README.md in one commit, with the
    account that `hf auth login` logged in.
    """, "saejax push-to-hub runs/demo/release --repo=me/my-sae", Options, run)
