"""Images or texts, and of which size: whether examples are what a network takes, and what to do where they are not."""

from collections.abc import Collection

import numpy as np

from jaxtune.errors import DataError

Shape = tuple[int | None, int | None, int]  # height, width, channels of an image; None where any will do


def check_kind(where: str, held: Collection[str], shape: Shape | None, *, takes_text: bool) -> None:
    """Checks that a network takes what examples hold.

    Args:
        where: What the error calls the examples.
        held: Names of what they hold: "image", "text".
        shape: Of the network's images; None where it takes none.
        takes_text: Whether the network takes texts.

    Raises:
        DataError: they are texts where only images are taken, or the reverse.
    """
    if shape is not None and not takes_text and "image" not in held:
        sizes = " x ".join("any" if size is None else str(size) for size in shape)
        raise DataError(
            f"{where}: {_name(held)}, and the network takes images of {sizes} (height, width, channels). Give images: "
            "an .npz file with train_x, and train_y where labels are needed."
        )
    if shape is None and takes_text and "text" not in held:
        raise DataError(
            f"{where}: {_name(held)}, and the network takes texts. Give texts: a .jsonl file, each line of it a JSON "
            'object with "text", and "label" where labels are needed.'
        )


def check_images(where: str, images: np.ndarray, shape: Shape) -> None:
    """Checks images, float[N, height, width, channels], against those that a network takes.

    Raises:
        DataError: another size, another number of channels, or no floats; advises on what differs alone.
    """
    if images.ndim != 4:
        advice = ["Give every image three axes: height, width, channels."]
    else:
        *size, channels = images.shape[1:]
        advice = []
        if any(want not in (None, got) for want, got in zip(shape, size, strict=False)):
            advice.append(f"They are {size[0]} x {size[1]}: resize them to {shape[0]} x {shape[1]}.")
        if channels != shape[2]:
            way = "take their mean" if shape[2] == 1 else "save them as the network was trained on"
            way = "repeat it on the last axis" if channels == 1 else way
            count = f"{channels} channel{'' if channels == 1 else 's'}"
            advice.append(f"They have {count}, the network takes {shape[2]}: {way}.")
    if images.dtype.kind != "f":
        advice.append("Scale them to floats in [0, 1].")
    if advice:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise DataError(
            f"{where}: the images are {images.dtype}{list(images.shape)}, the model takes float[N, {wanted}]. "
            f"{' '.join(advice)}"
        )


def _name(held):
    known = [words for kind, words in (("image", "images"), ("text", "texts")) if kind in held]
    return f"these are {known[0]}" if known else f"these hold {', '.join(held) or 'nothing'}"
