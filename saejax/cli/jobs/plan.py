"""`saejax plan`: what a config needs on a pod."""

from saejax import plan
from saejax.base.errors import ConfigError
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import configs


def start(arguments: Arguments) -> int:
    """The job, of every config given."""
    if arguments.option("compile") and arguments.option("topology") is None:
        raise ConfigError("saejax plan: --compile needs --topology, for example --topology=v5p:4x4x4")
    for config in configs(arguments):
        made = plan.make_plan(config, arguments.option("topology"), width=arguments.option("d_in"),
                              compiled=arguments.option("compile"))
        print(plan.as_json(made) if arguments.json else plan.as_table(made))
    return 0
