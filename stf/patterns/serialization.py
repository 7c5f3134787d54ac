"""Patterns as plain data and back, for the configs of layers and models."""

from stf.patterns.pattern import Pattern


def serialize(pattern):
    """A pattern as plain data, `{"class_name": ..., "config": ...}`, for JSON and Keras configs.

    Examples:
        >>> stf.patterns.serialize(stf.patterns.Strided(128))
        {'class_name': 'Strided', 'config': {'stride': 128}}

    Raises:
        ValueError: if `pattern` is not a pattern, or its class is another than that of stf.patterns of
            its name, which `deserialize` would make of it.
    """
    from stf import patterns

    if not isinstance(pattern, Pattern):
        raise ValueError(f"`pattern` must be a pattern. Received: pattern={pattern!r}")
    name = type(pattern).__name__
    if getattr(patterns, name, type(pattern)) is not type(pattern):
        raise ValueError(f"`pattern` must not be of another class named {name}. Received: pattern={pattern!r}")
    return {"class_name": name, "config": pattern.get_config()}


def deserialize(config):
    """The pattern that `serialize` made `config` from; further keys are ignored.

    Raises:
        ValueError: if `config` is not such a dict, names no pattern, or has arguments that the
            pattern refuses.
    """
    from stf import patterns

    if not isinstance(config, dict) or not {"class_name", "config"} <= config.keys():
        raise ValueError(
            f"`config` must be a dict with 'class_name' and 'config', as `serialize` gives. Received: config={config!r}"
        )
    name = config["class_name"]
    kind = getattr(patterns, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, Pattern) and kind is not Pattern):
        raise ValueError(f"`config` names no pattern. Received: class_name={name!r}")
    try:
        return kind.from_config(config["config"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"`config` does not fit {name} ({error}). Received: config={config!r}") from error


def get(pattern):
    """`pattern` itself, or the pattern of a dict that `serialize` gave; for a layer's argument.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, dict):
        return deserialize(pattern)
    raise ValueError(f"`pattern` must be a pattern of stf.patterns, or its config. Received: pattern={pattern!r}")
