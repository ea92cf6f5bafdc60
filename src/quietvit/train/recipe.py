"""Read recipes (TOML files, or the config.json of a run) and overrides into a ``TrainConfig``.

``config`` defines the keys.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

import quietvit
from quietvit.decay.config import EACH, ONE
from quietvit.errors import QuietvitError, nearest
from quietvit.files import not_utf8
from quietvit.text import is_utf8
from quietvit.train.config import DecayConfig, TrainConfig, decay_config

VERSION = 1


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a recipe by name (``list_recipes()``) or path, and override keys.

    Args:
        source: a name, or the path of a TOML recipe or of the ``config.json`` of a run.
        overrides: texts such as ``"optimizer.lr=3e-4"``. The value is TOML. A bare word is a
            string, and ``none`` unsets the key.

    Raises:
        QuietvitError: the recipe does not exist, is not valid TOML or has another version, or a key
            or value is refused. The message names the nearest known key.
    """
    path = _find(source)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors put a mark in front
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise QuietvitError(
            f"the recipe {path} is not in UTF-8 ({error}); save it as UTF-8."
        ) from error
    except (OSError, ValueError) as error:
        raise QuietvitError(f"the recipe {path} could not be read: {error}; correct it.") from error
    if not isinstance(content, dict) or content.get("recipe") != VERSION:
        version = content.get("recipe") if isinstance(content, dict) else None
        stated = "states no version" if version is None else f"is of version {version!r}"
        raise QuietvitError(
            f"the recipe {path} {stated}; this quietvit ({quietvit.__version__}) reads 'recipe = "
            f"{VERSION}'. Add that line, or install a quietvit that reads the version."
        )
    for override in overrides:
        _override(content, override)
    return parse_config(content, str(path))


def parse_config(content: Mapping[str, Any], source: str = "the configuration") -> TrainConfig:
    """Validate a nested mapping. Raises QuietvitError that names each wrong key and value."""
    try:
        config = TrainConfig.model_validate(content)
    except ValidationError as error:
        problems = [_explained(problem) for problem in error.errors()]
        shown = "; ".join(problems[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise QuietvitError(f"{source}: {shown}{more}.") from error
    refuse_not_utf8(config)
    return config


def list_recipes() -> dict[str, Path]:
    """Return the shipped recipes: name -> path."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.toml"))}


def recipes_folder() -> Path:
    """Return the folder of recipes: in the package if installed, else in the repository."""
    package = Path(quietvit.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def known_keys(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Return every dotted key of the configuration."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) is Annotated:
        return _sections(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [section for part in get_args(annotation) for section in _sections(part)]
    if annotation is DecayConfig:
        return [decay_config()]  # DecayConfig itself lacks the sections of the regularizers
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_section else []


def _find(source: str | Path) -> Path:
    known = list_recipes()
    if str(source) in known:
        return known[str(source)]
    path = Path(source).expanduser()
    if path.is_file():
        return path
    raise QuietvitError(
        f"there is no recipe {str(source)!r}{nearest(str(source), known)}; give a path, or one of: "
        f"{', '.join(known)}."
    )


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise QuietvitError(f"the override {override!r} is not of the form key=value.")
    if text == "none":
        value: Any = None
    else:
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
    *sections, last = key.split(".")
    place: Any = content
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise QuietvitError(
                f"the override {override!r} needs a section {section!r}, but that is a value"
                f"{nearest(key, known_keys())}."
            )
    place[last] = value


def refuse_not_utf8(config: TrainConfig) -> None:
    """Raise QuietvitError if a path or name in ``config`` is not valid UTF-8."""
    for key, value in _leaves(config.model_dump(), ""):
        if not is_utf8(str(value)):
            raise QuietvitError(f"{key}: {not_utf8(str(value))} config.json could not hold it.")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


def _explained(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part not in (ONE, EACH))
    if problem["type"] == "extra_forbidden":
        return f"there is no key {key!r}{nearest(key, known_keys())}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{key}: {message} (given: {problem['input']!r})" if key else message
