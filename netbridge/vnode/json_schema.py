"""The manifest's format as a JSON Schema (draft 7, which editors' YAML servers understand best), made from `schema`.

What a JSON Schema cannot say is left to `netbridge check`: a capability granted twice with two values, and how a number
is written. docs/vnode.schema.json is `text()`, and a test keeps it so.
"""

from __future__ import annotations

import json
from typing import Any

from netbridge.vnode.schema import (
    MANIFEST,
    Choice,
    Either,
    Fraction,
    Grants,
    ListOf,
    Section,
    Shape,
    Text,
    Whole,
)


def document() -> dict[str, Any]:
    """The JSON Schema as plain data."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Manifest of a V-Node (vnode.yml)",
        **_shape(MANIFEST),
    }


def text() -> str:
    """The JSON Schema as the file that is published."""
    return json.dumps(document(), indent=2, ensure_ascii=True) + "\n"


def _shape(shape: Shape) -> dict[str, Any]:
    match shape:
        case Text():
            pattern = f"^(?:{shape.pattern})$"
            return {
                "type": "string",
                "pattern": pattern,
                "maxLength": shape.longest,
                "examples": list(shape.examples),
            }
        case Choice():
            described = [{"const": word, "description": means} for word, means in shape.words.items()]
            return described[0] if len(described) == 1 else {"enum": list(shape.words)}
        case Whole():
            return {"type": "integer", "minimum": shape.least, "maximum": shape.most}
        case Fraction():
            return {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
        case ListOf():
            return {"type": "array", "items": _shape(shape.item), "uniqueItems": True, "maxItems": shape.longest}
        case Either():
            return {"anyOf": [_shape(choice) for choice in shape.shapes]}
        case Grants():
            return {"type": "array", "items": {"anyOf": _grants(shape)}, "uniqueItems": True}
        case Section():
            return _section(shape)


def _section(shape: Section) -> dict[str, Any]:
    properties = {}
    for key in shape.keys:
        properties[key.name] = {"description": key.means, **_shape(key.shape)}
        if not key.required:
            properties[key.name]["default"] = key.default
    required = [key.name for key in shape.keys if key.required]
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _grants(shape: Grants) -> list[dict[str, Any]]:
    """A bare name, or a mapping of the one name to its argument."""
    forms: list[dict[str, Any]] = []
    for kind in shape.kinds:
        argument = shape.arguments.get(kind.name)
        description = {"description": f"allows {kind.allows}"}
        if argument is None or not argument.required:
            forms.append({**description, "const": kind.name})
        if argument is not None:
            forms.append(
                {
                    **description,
                    "type": "object",
                    "properties": {kind.name: _shape(argument.shape)},
                    "required": [kind.name],
                    "additionalProperties": False,
                }
            )
    return forms
