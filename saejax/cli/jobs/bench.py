"""`saejax bench`: how fast this machine trains, reads and harvests."""

import json

from saejax.base.errors import ConfigError
from saejax.bench import run as bench
from saejax.cli.arguments import Arguments


def start(arguments: Arguments) -> int:
    """The job."""
    if arguments.paths:
        raise ConfigError(f"saejax bench: takes no path ({arguments.paths[0]})")
    given = {name: value for name, value in arguments.options.items()
             if value is not None and name not in ("threads", "out", "json")}
    result = bench.run(given, arguments.option("threads"), arguments.out)
    print(json.dumps(result) if arguments.json else bench.markdown(result))
    return 0
