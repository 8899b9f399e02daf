"""Stored images read back as the teacher sees them. Used by ``factory rescore`` and ``factory inspect --metrics``."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from manifests.errors import DataError
from manifests.selection import Selection
from stages.models.inputs import to_unit

BATCH = 64


def stored_images(selection: Selection, indices: Sequence[int]) -> Tensor:
    """Images ``[n, 3, side, side]`` in [−1, 1] of ``indices``.

    Raises DataError naming the sample that is missing, altered, no image, or not of the dataset's size.
    """
    side = selection.manifest.info.image_size
    images = []
    for index, data in zip(indices, selection.read_many(list(indices)), strict=True):
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.size != (side, side):  # before anything is decoded
                    raise ValueError(f"{image.width}×{image.height} pixels, expected {side}×{side}")
                images.append(np.asarray(image.convert("RGB")))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{selection.manifest.url}: sample {selection.row(index)['key']}: {error}") from None
    return to_unit(torch.from_numpy(np.stack(images)))
