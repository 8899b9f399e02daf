"""What the inverting methods share: images that the teacher could have been trained on, without a prior."""

import math

import torch
from torch import Tensor

from manifests.errors import DataError
from stages.models.teacher import Teacher
from stages.synth.groups import Group
from stages.synth.guidance import Losses


class Best:
    """The iterate of the lowest loss so far: ``images [n, 3, h, w]`` and the terms they had."""

    images: Tensor
    losses: Losses

    def __init__(self) -> None:
        self.loss = math.inf

    def offer(self, loss: Tensor, images: Tensor, losses: Losses) -> None:
        """Keep this iterate if it is better; NaN never is."""
        if loss.item() < self.loss:
            self.loss, self.images, self.losses = loss.item(), images.detach().clone(), losses.detached()

    def checked(self, group: Group) -> Tensor:
        """Its images. Raises DataError where no iterate had a finite loss."""
        if self.loss == math.inf:
            raise DataError(f"group {group.index}: the loss was never finite; try a smaller learning rate")
        return self.images


def inverted_side(teacher: Teacher, size: int | None) -> int:
    """Side of inverted images: as they are stored, by default what the teacher sees."""
    return size or teacher.input.size


def as_rgb(images: Tensor) -> Tensor:
    """``[n, 1 or 3, h, w]`` to ``[n, 3, h, w]``: a teacher of luminance is shown (and given) grey images."""
    return images.expand(-1, 3, -1, -1)


def unit_pixels(noise: Tensor, teacher: Teacher) -> Tensor:
    """Unit noise ``[n, channels, h, w]`` in the teacher's normalisation as pixels in [−1, 1]."""
    mean, std = (
        torch.tensor(v, device=noise.device).view(1, -1, 1, 1)
        for v in (teacher.input.settings.mean, teacher.input.settings.std)
    )
    return (2 * (mean + std * noise) - 1).clamp(-1, 1)
