"""A resolved recipe as YAML that people read and `recipe.load` reads back."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from tunedock.recipe.document import Key, dotted

_WIDE = 1 << 20  # a folded line would part a value from its comment
_COMMENT_COLUMN = 44


class _Representer(RoundTripRepresenter):
    def represent_none(self, data: None) -> ScalarNode:
        """`key: null`, for a bare `key:` reads as if something were missing."""
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def commented_yaml(values: dict[str, Any], comments: dict[str, str], leave_out: Key) -> str:
    """`values` as YAML. `comments` (dotted key -> text) stand beside their values.

    the key `leave_out` is not written.
    """
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = _WIDE
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(_commented(values, (), comments, leave_out), out)
    return out.getvalue()


def _commented(value: Any, key: Key, comments: dict[str, str], leave_out: Key) -> Any:
    if isinstance(value, str):
        # Plain style would fold or block what has line breaks, and a comment cannot stand beside a block; and ruamel's emitter
        # leaves what begins like a key's mark without quotes inside a flow list.
        plain = value.isprintable() and not value.startswith(("?", ":"))
        return value if plain else DoubleQuotedScalarString(value)
    if isinstance(value, list):
        items = CommentedSeq(_commented(item, (*key, i), comments, leave_out) for i, item in enumerate(value))
        if not any(isinstance(item, dict) for item in value):
            items.fa.set_flow_style()
        return items
    return _mapping(value, key, comments, leave_out) if isinstance(value, dict) else value


def _mapping(value: dict[str, Any], key: Key, comments: dict[str, str], leave_out: Key) -> CommentedMap:
    mapping = CommentedMap()
    for name, child in value.items():
        here = (*key, name)
        if here == leave_out:
            continue
        mapping[name] = _commented(child, here, comments, leave_out)
        if comment := comments.get(dotted(here)):
            mapping.yaml_add_eol_comment(" ".join(comment.split()), name, column=_COMMENT_COLUMN)
    if not value:
        mapping.fa.set_flow_style()
    return mapping
