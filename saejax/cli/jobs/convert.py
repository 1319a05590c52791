"""`saejax convert`: an SAE of any library -> the files of another one."""

from saejax.base.errors import ConfigError
from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import array_of
from saejax.formats.convert import convert


def start(arguments: Arguments) -> int:
    """The job."""
    if len(arguments.paths) != 2 or not arguments.option("to"):
        raise ConfigError("saejax convert: give SRC, DST and --to=FORMAT, for example: saejax convert runs/demo my_sae "
                          "--to=dictionary_learning")
    if arguments.option("approximate") != (arguments.option("rows") is not None):
        raise ConfigError("saejax convert: --approximate and --rows=FILE.npy go together: the error is measured on those rows")
    source, directory = arguments.paths
    to, file = arguments.option("to"), arguments.option("rows")
    sae, compared = convert(str(source), directory, to, None if file is None else array_of("rows", file))
    if is_writer():
        print(f"converted {directory}: {to}, {sae}\ncompared  {compared}")
    return 0
