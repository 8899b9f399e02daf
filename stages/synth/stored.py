"""Stored images read back as the teacher sees them. Used by ``factory rescore`` and ``factory inspect --metrics``."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from manifests.errors import DataError
from manifests.images import decode
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
            images.append(decode(data, side))
        except ValueError as error:
            raise DataError(f"{selection.manifest.url}: sample {selection.row(index)['key']}: {error}") from None
    return to_unit(torch.from_numpy(np.stack(images)))
