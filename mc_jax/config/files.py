"""A config as JSON and back, and what differs between two."""

import dataclasses
import difflib
import json
from typing import Any

from mc_jax.config.checks import must_fit
from mc_jax.config.settings import Config, ConfigError

# What MLP memories were before there was a setting for it: a config.json without it means that.
_LEFT_OUT_BRANCH = {"memory_branch": "plain"}


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The config that `to_dict` was given.

    Raises:
      ConfigError: for a section or field that is not known, with the nearest known name, or a value that is
        none of its field.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"a config is an object with {', '.join(_SECTIONS)}, not {_shortly(values)}")
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    built = {}
    for name, content in values.items():
        _must_be_known(name, name, sections)
        section_type: Any = sections[name]
        if not isinstance(content, dict):
            raise ConfigError(f"{name} is an object with settings, not {_shortly(content)}")
        known = {field.name: field.type for field in dataclasses.fields(section_type)}
        # JSON has no tuples.
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        for field, value in fields.items():
            _must_be_known(f"{name}.{field}", field, known)
            must_fit(f"{name}.{field}", value, known[field])
        if name == "model" and fields.get("memory_depth") == 2:
            fields = _LEFT_OUT_BRANCH | fields
        built[name] = section_type(**fields)
    return Config(**built)


_SECTIONS = [field.name for field in dataclasses.fields(Config)]


def _shortly(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:36]} ..."


def _must_be_known(path: str, name: str, known: Any) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        cure = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
        raise ConfigError(f"there is no setting {path}; {cure}")


def to_flat_dict(config: Config) -> dict[str, Any]:
    """Every field by its full name, {"model.num_layers": 12, ...}."""
    return {
        f"{section}.{name}": value
        for section, content in to_dict(config).items()
        for name, value in content.items()
    }


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Fields whose values differ: {"model.num_layers": (value in config, value in other)}."""
    second = to_flat_dict(other)
    return {
        name: (value, second[name]) for name, value in to_flat_dict(config).items() if value != second[name]
    }


def to_json(config: Config) -> str:
    """The config as indented JSON text."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config of a `config.json`.

    Raises:
      ConfigError: the text is not JSON, or not of a config.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"config.json is not JSON ({error}); restore it, or start the run anew") from error
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"config.json: {error}") from None
