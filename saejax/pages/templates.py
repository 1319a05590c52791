"""The one template environment of all pages: everything that is put in is escaped."""

import functools
from importlib import resources

import jinja2
from markupsafe import Markup

from saejax.base.version import __version__


def source(name: str) -> str:
    """The text of a file of this room: a template, or a script or style as `site/app.js`."""
    return resources.files("saejax.pages").joinpath(*name.split("/")).read_text("utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     loader=jinja2.FunctionLoader(source))
    environment.globals |= {"version": __version__, "theme": Markup(source("site/theme.css"))}
    return environment


def render(template: str, **values) -> str:
    """A page from a template of this room; a value that it names and that is not given is an error."""
    return _environment().get_template(template).render(**values)
