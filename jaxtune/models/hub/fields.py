"""The fields of another library's config.json: read by name, with that library's defaults, refused by name."""

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import ConfigError

# Name of an activation there -> ours. The tanh forms differ in how they are written, not in what they compute.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Fields of any family that change what the network computes, or what its tensors mean, and the values without effect.
INERT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "per_layer_config": (None, {}, []),
    "pruned_heads": (None, {}, []),
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
}


class Fields:
    """One config.json with the defaults of its family.

    A field that is `null` there is None here, as it is for that library: only one that is missing has its default.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]):
        """
        Args:
            values: As parsed.
            defaults: Field -> what a config.json without it means.

        Raises:
            ConfigError: a field of `INERT` with an effect.
        """
        self.values, self.defaults = values, defaults
        for name, inert in INERT.items():
            if name in values:
                self.only(name, *inert)

    def __getitem__(self, name: str) -> Any:
        if name in self.defaults:
            return self.values.get(name, self.defaults[name])
        if self.values.get(name) is not None:
            return self.values[name]
        raise self.error(f'config.json has no "{name}"; a {self.model_type} needs it. Take the original config.json.')

    def get(self, name: str, default: Any = None) -> Any:
        """The field, or `default` where neither the file nor the family has one."""
        return self.values.get(name, self.defaults.get(name, default))

    @property
    def model_type(self) -> str:
        """Name of the family."""
        return str(self.values.get("model_type"))

    def only(self, name: str, *supported: Any) -> Any:
        """The field, which must be one of `supported`; None where there is none.

        Raises:
            ConfigError: it is another.
        """
        value = self.get(name)
        if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in supported):
            choices = ", ".join(repr(choice) for choice in supported)
            raise self.error(
                f'"{name}" is {value!r} in config.json. It changes what the network computes, and of a '
                f"{self.model_type} only {choices} is supported."
            )
        return value

    def activation(self, name: str) -> str:
        """Our name of an activation.

        Raises:
            ConfigError: one that we do not have.
        """
        value = self[name]
        if value not in ACTIVATIONS:
            raise self.error(f'"{name}" is {value!r} in config.json; supported: {", ".join(ACTIVATIONS)}.')
        return ACTIVATIONS[value]

    def num_labels(self) -> int:
        """Outputs of a classification head: `num_labels`, or how many labels are named, or 2."""
        return self.values.get("num_labels") or len(self.values.get("id2label") or (0, 1))

    def head(self, kinds: Mapping[str, str]) -> str:
        """What stands on the network, by the class that it was saved from.

        Args:
            kinds: End of a class's name -> kind of head. The first kind is that of a config.json that names no class.

        Raises:
            ConfigError: a class that ends otherwise.
        """
        classes = self.values.get("architectures") or []
        for ending, kind in kinds.items():
            if not classes or str(classes[0]).endswith(ending):
                return kind
        raise self.error(
            f'"architectures" is {classes} in config.json. Read are classes that end with {", ".join(kinds)}.'
        )

    def error(self, message: str) -> ConfigError:
        """An error to raise."""
        return ConfigError(message)
