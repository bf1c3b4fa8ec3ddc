"""The page that documents the query API, written from its own description: no scripts, nothing from elsewhere."""

from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font: 600 1.05rem ui-monospace, monospace; margin: 2rem 0 .25rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
td:first-child { font-family: ui-monospace, monospace; white-space: nowrap; }
"""


def page(description: Mapping[str, Any], *, root: str = "") -> str:
    """Return the page as HTML.

    Parameters
    ----------
    description : mapping
        The OpenAPI document.
    root : str
        Path that the API is mounted at.
    """
    paths = description["paths"].items()
    parts = [_operation(path, one["get"], root) for path, one in paths if "get" in one]
    title = escape(description["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: query API</title><style>{_STYLE}</style>'
        f"<h1>Query API</h1><p>{escape(description['info'].get('description', ''))}</p>"
        f'<p><a href="{escape(root)}/openapi.json">openapi.json</a> describes it for programs; '
        f"files of the stores are below <code>{escape(root)}/zarr/NAME/</code>.</p>{''.join(parts)}</html>"
    )


def _operation(path: str, one: Mapping[str, Any], root: str) -> str:
    address = escape(root + path)
    plain = "{" not in path and not any(p.get("required") for p in one.get("parameters", ()))
    shown = f'<a href="{address}">{address}</a>' if plain else address
    rows = "".join(_parameter(parameter) for parameter in one.get("parameters", ()))
    table = f"<table><tr><th>parameter<th>form<th>what</tr>{rows}</table>" if rows else ""
    return f"<h2>GET {shown}</h2><p>{escape(one.get('description', ''))}</p>{table}"


def _parameter(one: Mapping[str, Any]) -> str:
    needed = " (needed)" if one.get("required") else ""
    return (
        f"<tr><td>{escape(one['name'])}{needed}<td>{escape(_form(one.get('schema', {})))}"
        f"<td>{escape(one.get('description', ''))}</tr>"
    )


def _form(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_form(kind) for kind in schema["anyOf"] if kind.get("type") != "null")
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"{_form(schema.get('items', {}))}, repeated"
    return str(schema.get("type", ""))
