"""`saejax push-to-hub`: a release -> a Hugging Face repository."""

from saejax.base.errors import ConfigError
from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.formats.publish import publish


def start(arguments: Arguments) -> int:
    """The job."""
    if len(arguments.paths) != 1 or not arguments.option("repo"):
        raise ConfigError("saejax push-to-hub: give one release directory and --repo=ORG/NAME")
    said = publish(arguments.paths[0], arguments.option("repo"), arguments.option("license"), upload=arguments.option("yes"))
    if is_writer():
        print(said if arguments.option("yes") else f"{said}; --yes does it")
    return 0
