"""Names of resources in paths."""

from starlette.convertors import Convertor, register_url_convertor


class _Environment(Convertor[str]):
    """An environment's id, with or without its collection before it: `{name:environment}`.

    Not `path`: what follows the id may have the same words in it.
    """

    regex = "(?:environments/)?[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _Agent(_Environment):
    """The same for an agent's id: `{name:agent}`."""

    regex = "(?:agents/)?[^/]+"


class _Path(_Environment):
    """A path to its very end: Starlette's own one stops before a line feed, which names may have.

    The one of mounts too, so it takes the name `path`.
    """

    regex = "(?s:.*)"


register_url_convertor("path", _Path())
register_url_convertor("environment", _Environment())
register_url_convertor("agent", _Agent())
