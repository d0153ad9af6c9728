"""The JSON schema of a configuration, with which editors complete and check it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def json_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The schema of a kind of configuration. For a build it has the options of each kind of source.

    It knows keys, types and ranges. `audit` and `doctor` find what depends on several keys, or on files.
    """
    from ...schemas.config import SHORTHANDS, BuildConfig

    schema = kind.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    if kind is not BuildConfig:
        return schema
    definitions = schema["$defs"]
    sources = [{"$ref": f"#/$defs/source-{name}"} for name in _add_sources(definitions)]
    one = {"anyOf": sources}
    listed = definitions["Subset"]["properties"]["sources"]
    described = {"title": listed["title"], "description": listed["description"]}
    definitions["Subset"]["properties"]["sources"] = {
        **described,
        "anyOf": [one, {"type": "array", "minItems": 1, "items": one}],
    }
    for name in SHORTHANDS:  # as 0.1 has them: sources of one kind, which need no name of it
        own = {key: value for key, value in definitions[f"source-{name}"].items() if key != "required"}
        schema["properties"][name] = {"anyOf": [own, {"type": "array", "items": own}]}
    schema["required"] = ["out"]
    return schema


def _add_sources(definitions: dict[str, Any]) -> list[str]:
    """Add the schema of each kind of source, whose key `source` names the kind; the kinds."""
    from ...pipeline.sources.registry import SOURCES, find_options

    for name in SOURCES:
        own = find_options(name).model_json_schema()
        definitions.update(own.pop("$defs", {}))
        own["properties"] = {"source": {"const": name}, **own["properties"]}
        own["required"] = ["source", *own.get("required", [])]
        definitions[f"source-{name}"] = own
    # A class of your own: its options are known when it is imported.
    definitions["source-own"] = {
        "type": "object",
        "properties": {"source": {"type": "string", "pattern": ":"}},
        "required": ["source"],
    }
    return [*SOURCES, "own"]
