"""Options of merge methods: known by name, complete, and one value a model where they belong to a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.errors import ConfigError, unknown_name
from jaxtune.merge.method import REQUIRED, Method


def check_options(
    method: Method, options: Mapping[str, Any], num_models: int, *, has_base: bool, name: str = ""
) -> dict[str, Any]:
    """All options of a method, defaults filled in.

    Args:
        method: As the registry has it.
        options: As recipes spell them; per-model ones as one value, or a sequence with one a model. `preset` names a
            peer, whose conventions then are the defaults.
        num_models: Without the base.
        has_base: Whether there is a base.
        name: Of the method, for messages.

    Raises:
        ConfigError: a count that the method does not take, a base too many or too few, an option that is missing or
            has another number of values than there are models.
        UnknownNameError: no such option or preset.
    """
    name = f"merge method {name!r}" if name else "this merge method"
    check_counts(method, num_models, has_base=has_base, name=name)
    options = dict(options)
    preset = options.pop("preset", None)
    if preset is not None and preset not in method.presets:
        raise unknown_name(f"preset of {name}", str(preset), method.presets or ["(none)"])
    known = method.options
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {name}", option, known or ["(none)"])
    full = {**known, **(method.presets[preset] if preset is not None else {}), **options}
    for option, value in full.items():
        if value is REQUIRED:
            raise ConfigError(f"{name} needs the option {option!r}; there is no default.")
        if option in method.per_model:
            full[option] = _per_model(name, option, value, num_models)
    if method.check is not None:
        method.check(full)
    return full


def check_between(options: Mapping[str, Any], option: str, low: float, high: float) -> None:
    """Checks that an option, or its value for every model, is within bounds; what is traced by JAX is not looked at.

    Raises:
        ConfigError: it is not.
    """
    values = options[option] if isinstance(options[option], tuple) else (options[option],)
    for value in values:
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ConfigError(f"option {option!r}: expected a number from {low:g} to {high:g}, got {value!r}.")


def check_choice(options: Mapping[str, Any], option: str, choices: Sequence[Any]) -> None:
    """Checks that an option is one of a few values.

    Raises:
        UnknownNameError: it is not.
    """
    if not any(options[option] is choice or options[option] == choice for choice in choices):
        raise unknown_name(f"value of the option {option!r}", str(options[option]), [str(choice) for choice in choices])


def check_task(options: Mapping[str, Any], option: str, num_models: int) -> None:
    """Checks that an option is the place of a model among the others, counted from 0.

    Raises:
        ConfigError: it is not.
    """
    value = options[option]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_models:
        raise ConfigError(f"option {option!r}: expected a model from 0 to {num_models - 1}, got {value!r}.")


def check_counts(method: Method, num_models: int, *, has_base: bool, name: str) -> None:
    """Checks the number of models and the base.

    Raises:
        ConfigError: see there.
    """
    least, most = method.num_models
    if num_models < least or (most is not None and num_models > most):
        many = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        beside = " beside the base" if method.base == "needs" else ""
        raise ConfigError(f"{name} takes {many} models{beside}, got {num_models}.")
    if method.base == "needs" and not has_base:
        raise ConfigError(f"{name} works on task vectors and needs a base: name the model they were fine-tuned from.")
    if method.base == "none" and has_base:
        raise ConfigError(f"{name} takes no base: leave it out, or name it among the models.")


def _per_model(name, option, value, num_models):
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != num_models:
            raise ConfigError(f"{name}: option {option!r}: expected one value or {num_models}, got {len(value)}.")
        return tuple(value)
    return (value,) * num_models
