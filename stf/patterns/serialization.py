"""Patterns as plain data and back, for the configs of layers and models."""

import contextvars
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

from stf.patterns.pattern import Pattern

P = TypeVar("P", bound=Pattern)
_registered: dict[str, type[Pattern]] = {}  # classes of users' own, by name
# Those that `deserialize` was given, for the patterns within the pattern that it makes.
_custom_objects: contextvars.ContextVar[Mapping[str, Any] | None]
_custom_objects = contextvars.ContextVar("custom_objects", default=None)


def register(cls: type[P]) -> type[P]:
    """Decorator of a pattern's class of one's own: has `deserialize` make it of its name.

    So that models with the pattern load without being told of it. Keras' own ways do too: a class in
    `keras.saving.custom_object_scope`, in the `custom_objects` of `load_model`, or registered with Keras by its name.

    Examples:
        >>> @stf.patterns.register
        ... class Sliding(stf.patterns.Local):
        ...     pass
        >>> stf.patterns.deserialize({"class_name": "Sliding", "config": {"window": 2}})
        Sliding(window=2)

    Args:
        cls: a subclass of `Pattern`, with a name that no pattern of stf.patterns has. A later class of a name takes
            the place of an earlier one.

    Returns:
        `cls`.

    Raises:
        ValueError: if it is no such class.
    """
    if not _is_pattern(cls) or _own(cls.__name__) is not None:
        raise ValueError(
            f"`cls` must be a subclass of Pattern, not named as one of stf.patterns. Received: cls={cls!r}"
        )
    _registered[cls.__name__] = cls
    return cls


def serialize(pattern: Pattern) -> dict[str, Any]:
    """A pattern as plain data, `{"class_name": ..., "config": ...}`, for JSON and Keras configs.

    Examples:
        >>> stf.patterns.serialize(stf.patterns.Strided(128))
        {'class_name': 'Strided', 'config': {'stride': 128}}

    Raises:
        ValueError: if `pattern` is not a pattern, or its class is another than that of stf.patterns of
            its name, which `deserialize` would make of it.
    """
    if not isinstance(pattern, Pattern):
        raise ValueError(f"`pattern` must be a pattern. Received: pattern={pattern!r}")
    name = type(pattern).__name__
    if _own(name) not in (None, type(pattern)):
        raise ValueError(f"`pattern` must not be of another class named {name}. Received: pattern={pattern!r}")
    return {"class_name": name, "config": pattern.get_config()}


def deserialize(config: dict[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Pattern:
    """The pattern that `serialize` made `config` from; further keys are ignored.

    Args:
        config: what `serialize` gave.
        custom_objects: classes of one's own by name; those that Keras has been told of, and those that `register` was
            called with, need not be named. The patterns of this package come first.

    Raises:
        ValueError: if `config` is not such a dict, names no pattern, or has arguments that the
            pattern refuses.
    """
    if not isinstance(config, dict) or not {"class_name", "config"} <= config.keys():
        raise ValueError(
            f"`config` must be a dict with 'class_name' and 'config', as `serialize` gives. Received: config={config!r}"
        )
    name = config["class_name"]
    custom_objects = _custom_objects.get() if custom_objects is None else custom_objects
    kind = _named(name, custom_objects) if isinstance(name, str) else None
    if not _is_pattern(kind) or kind is Pattern:
        raise ValueError(
            "`config` names no pattern; one of your own needs `stf.patterns.register`, or `custom_objects`. "
            f"Received: class_name={name!r}"
        )
    within = _custom_objects.set(custom_objects)
    try:
        return kind.from_config(config["config"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"`config` does not fit {name} ({error}). Received: config={config!r}") from error
    finally:
        _custom_objects.reset(within)


def get(pattern: Pattern | dict[str, Any]) -> Pattern:
    """`pattern` itself, or the pattern of a dict that `serialize` gave; for a layer's argument.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, dict):
        return deserialize(pattern)
    raise ValueError(f"`pattern` must be a pattern of stf.patterns, or its config. Received: pattern={pattern!r}")


def _own(name):
    """The pattern of stf.patterns of a name, or None."""
    from stf import patterns

    kind = getattr(patterns, name, None) if name in patterns.__all__ else None
    return kind if _is_pattern(kind) else None


def _is_pattern(kind: Any) -> TypeGuard[type[Pattern]]:
    return isinstance(kind, type) and issubclass(kind, Pattern)


def _named(name, custom_objects):
    """The class of a name, or None."""
    own = _own(name)
    if own is not None:
        return own
    if custom_objects and name in custom_objects:
        return custom_objects[name]
    keras = sys.modules.get("keras")  # where it has not been imported it has been told nothing
    if keras is not None:
        by_keras = keras.saving.get_registered_object(name)
        if by_keras is None:  # of a package: registered as "package>name"
            objects = keras.saving.get_custom_objects()
            named = (each for key, each in objects.items() if key.rpartition(">")[2] == name)
            by_keras = next(filter(_is_pattern, named), None)
        if _is_pattern(by_keras):
            return by_keras
    return _registered.get(name)
