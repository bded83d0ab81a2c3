"""Numbers of decoder layers that methods are given, checked."""

from __future__ import annotations


def check_layer(value: object, name: str = "layer") -> None:
    """Refuse what is no decoder layer before which tokens can leave.

    Raises:
        ValueError: with what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} must be a layer's number, at least 1 (tokens that leave before layer 0 are for methods of the "
            f"stage 'projector'), got {value!r}"
        )


def check_depth(layer: int, depth: int, name: str = "layer") -> None:
    """Refuse a layer that the model does not have.

    Raises:
        ValueError: with the layers it has.
    """
    if layer >= depth:
        raise ValueError(f"{name} is {layer}, but the model has {depth} decoder layers (0 to {depth - 1})")
