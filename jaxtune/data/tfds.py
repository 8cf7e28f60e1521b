"""Prepared TensorFlow Datasets, read without TensorFlow.

Only the files on disk are used (features.json, dataset_info.json and ArrayRecord shards), so a data set opens
even where the code that made it, or TensorFlow, is not installed.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtune.data.source import SplitMissingError, check_indices, check_split
from jaxtune.errors import DataError, unknown_name


def open_tfds(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    image_key: str = "image",
    label_key: str = "label",
    validation_fraction: float = 0.1,
    class_prefix: str = "",
) -> "TfdsSource":
    """Opens a split of a data set that `tfds build --file_format=array_record` has prepared.

    Args:
        name: As TFDS knows it: "mnist", "imagenet_v2/matched-frequency", "mnist:3.0.1".
        split: Where the data set has no validation split, the last part of train is one (TFDS shuffles when
            it prepares), and train is the rest.
        data_dir: Where it was prepared; None is TFDS's own default.
        image_key: Feature that holds the image, uint8.
        label_key: Feature that holds the label, a ClassLabel; the class names are its.
        validation_fraction: Of the train records.
        class_prefix: Put before every class name.

    Raises:
        UnknownNameError: no such feature or split; lists the known ones.
        DataError: tensorflow-datasets is missing, the data set is not prepared or in another format, or a
            feature is of another kind.
    """
    check_split(f"tfds:{name}", split)
    if not 0.0 <= validation_fraction < 1.0:
        raise DataError(f"tfds:{name}: validation_fraction must be in [0, 1), got {validation_fraction}.")
    builder = _open_builder(name, data_dir)
    features = builder.info.features
    for key in (image_key, label_key):
        if key not in features:
            raise unknown_name(f"feature of tfds:{name}", key, features)
    if getattr(features[label_key], "names", None) is None:
        raise DataError(f"tfds:{name}: feature {label_key!r} is {features[label_key]}, expected a ClassLabel.")
    if np.dtype(features[image_key].np_dtype) != np.uint8 or len(features[image_key].shape) != 3:
        raise DataError(f"tfds:{name}: feature {image_key!r} is {features[image_key]}, expected a uint8 Image.")
    records = builder.as_data_source(split=_slice_of(name, builder.info.splits, split, validation_fraction))
    class_names = tuple(class_prefix + label for label in features[label_key].names)
    return TfdsSource(f"tfds:{name}", split, class_names, records, image_key, label_key)


class TfdsSource:
    """A `DataSource` over the random access reader of TFDS; made by `open_tfds`."""

    def __init__(
        self,
        name: str,
        split: str,
        class_names: tuple[str, ...],
        records: Sequence[dict[str, np.ndarray]],
        image_key: str,
        label_key: str,
    ):
        self.name, self.split, self.class_names = name, split, class_names
        self._records, self._image_key, self._label_key = records, image_key, label_key

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: values[0] for key, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """As `DataSource`; raises `DataError` where the images of the batch differ in shape."""
        indices = check_indices(self, indices)
        records = self._records.__getitems__(indices.tolist())
        images = [record[self._image_key] for record in records]
        shapes = sorted({image.shape for image in images})
        if len(shapes) > 1:
            raise DataError(
                f"{self.name} ({self.split}): images of {len(shapes)} shapes in one batch, for instance {shapes[0]} "
                f"and {shapes[-1]}. Prepare the data set with images of one size."
            )
        labels = np.array([record[self._label_key] for record in records], np.int32)
        return {"image": np.stack(images).astype(np.float32) / np.float32(255.0), "label": labels}


def _open_builder(name, data_dir):
    """A read-only builder over the prepared files; never the data set's own code, which may need TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"tfds:{name} needs tensorflow-datasets, which cannot be imported ({error}). "
            "Install it with: pip install 'jaxtune[tfds]'"
        ) from error
    open_files = functools.partial(tfds.core.read_only_builder.builder_from_files, name, data_dir=data_dir)
    try:
        builder = open_files()
    except tfds.core.DatasetNotFoundError as error:
        where = data_dir or "the default data_dir of TFDS"
        raise DataError(
            f"tfds:{name}: not prepared under {where}. Prepare it once, where TensorFlow may be installed, with: "
            f"tfds build {name} --file_format=array_record --data_dir=DIR"
        ) from error
    if tfds.core.FileFormat.ARRAY_RECORD not in builder.info.available_file_formats():
        raise DataError(
            f"tfds:{name}: prepared as {builder.info.file_format.value} in {builder.data_dir}, which has no random "
            f"access. Convert it once with: tfds convert_format --dataset_version_dir={builder.data_dir} "
            "--out_file_format=array_record"
        )
    return open_files(file_format="array_record")


def _slice_of(name, splits, split, fraction):
    """The TFDS split string that holds our split."""
    is_cut = split != "test" and "validation" not in splits
    stored = "train" if is_cut else split
    if stored not in splits:
        raise unknown_name(f"split of tfds:{name}", stored, splits)
    if not is_cut:
        return split
    num_records = splits["train"].num_examples
    num_held = round(num_records * fraction)
    if split == "train":
        return f"train[:{num_records - num_held}]"
    if not num_held:
        raise SplitMissingError(
            f"tfds:{name}: there is no validation split, and a validation_fraction of {fraction} of {num_records} "
            "train records leaves none for one. Give a larger fraction."
        )
    return f"train[{num_records - num_held}:]"
