"""CMI (Fang et al. 2021): a generator for each batch, trained with a contrastive term that keeps images apart.

A group is made in batches; the memory bank holds its earlier ones and never those of another group, which is the unit
of determinism. ``dda`` starts from these images.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.errors import UsageError
from stages.memory import in_micro_batches, moment_sums, moments
from stages.models.teacher import Teacher, moments_gap
from stages.seeds import derive, torch_rng
from stages.settings import SynthSettings
from stages.synth.group import Group
from stages.synth.guidance import Losses, class_prior, disagreement
from stages.synth.inversion import Best, as_rgb, inverted_side
from stages.synth.sampler import Counters, DecodedGroup, Models

RATIO = 4 / 3  # largest ratio of a crop's sides


def draw_crops(n: int, area: tuple[float, float], flip: bool, rng: torch.Generator) -> Tensor:
    """Windows ``[n, 4]`` (y, x, height, width as shares of the side; mirrored where the width is negative): a random
    share of the area with sides of random ratio, as in Inception's crops (Szegedy et al. 2015)."""
    u = torch.rand(n, 5, generator=rng)
    share = area[0] + (area[1] - area[0]) * u[:, 0]
    ratio = torch.exp((2 * u[:, 1] - 1) * math.log(RATIO))
    h, w = ((share / ratio).sqrt().clamp_max(1), (share * ratio).sqrt().clamp_max(1))
    return torch.stack([u[:, 2] * (1 - h), u[:, 3] * (1 - w), h, mirrored(w, u[:, 4], flip)], 1)


def draw_shifts(n: int, side: int, limit: float, flip: bool, rng: torch.Generator) -> Tensor:
    """Windows ``[n, 4]`` of the whole size, off by whole pixels up to ``limit`` of ``side``."""
    reach = round(limit * side)
    moved = torch.randint(-reach, reach + 1, (n, 2), generator=rng) / side
    one = torch.ones(n)
    return torch.cat([moved, one[:, None], mirrored(one, torch.rand(n, generator=rng), flip)[:, None]], 1)


def mirrored(width: Tensor, u: Tensor, flip: bool) -> Tensor:
    return torch.where(u < 0.5, -width, width) if flip else width


def views(images: Tensor, windows: Tensor) -> Tensor:
    """``images [n, c, s, s]`` seen through ``windows [n, 4]``, stretched to the same size; edges are repeated.

    A view is two small matrices an image (rows, columns), so that its gradient is a matrix product: the same numbers on
    every run, which grid sampling does not promise on a GPU.
    """
    side = images.shape[-1]
    rows = weights(windows[:, 0], windows[:, 2], side).to(images)
    columns = weights(windows[:, 1], windows[:, 3], side).to(images)
    return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)


def weights(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Bilinear weights ``[n, side, side]`` of the pixels under each pixel of the view (backwards: negative length).

    >>> weights(torch.tensor([0.5]), torch.tensor([1.0]), 2).tolist()
    [[[0.0, 1.0], [0.0, 1.0]]]
    """
    centers = (torch.arange(side) + 0.5) / side
    along = torch.where(length[:, None] < 0, 1 - centers, centers) * length.abs()[:, None]
    position = ((start[:, None] + along) * side - 0.5).clamp(0, side - 1)
    return (1 - (position[:, :, None] - torch.arange(side)).abs()).clamp_min(0)


START = 8  # largest side of the first map


class Generator(nn.Module):
    """``[n, latent]`` to images ``[n, channels, side, side]`` in [−1, 1]: a linear layer to a small map of ``2·width``
    channels, then doublings (at least two) with a convolution each."""

    def __init__(self, latent: int, width: int, channels: int, side: int) -> None:
        super().__init__()
        doublings = max(2, math.ceil(math.log2(side / START)))
        self.sides = [math.ceil(side / 2**i) for i in range(doublings, -1, -1)]
        self.inner = 2 * width
        self.project = nn.Linear(latent, self.inner * self.sides[0] ** 2)
        self.first = nn.BatchNorm2d(self.inner)
        outputs = [self.inner] * (doublings - 1) + [width]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(self.inner, c, 3, padding=1), nn.BatchNorm2d(c), nn.LeakyReLU(0.2, inplace=True))
            for c in outputs
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(self.project(z).view(len(z), self.inner, self.sides[0], self.sides[0]))
        for block, side in zip(self.blocks, self.sides[1:], strict=True):
            x = block(F.interpolate(x, size=(side, side), mode="nearest"))
        return torch.tanh(self.last(x))


WIDTH = 256  # of the head


def embedding(teacher: Teacher, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """Logits ``[n, C]``, BatchNorm moments of the batch (none without such layers; ``[c]`` each) and an embedding
    ``[n, D]`` from one pass.

    The embedding: each image's mean of every BatchNorm input, in units of its running statistics, so that all layers
    count alike; penultimate features where the teacher has no BatchNorm.
    """
    if not teacher.has_batchnorm:
        logits, features = teacher.with_features(images)
        if features is None:
            raise UsageError(f"{teacher.what} has neither BatchNorm nor features to contrast: set cmi.cr=0")
        return logits, [], features

    def evaluate(x: Tensor) -> tuple[Tensor, ...]:
        logits, inputs = teacher.with_batchnorm_inputs(x)
        layers = list(zip(inputs, teacher.batchnorms, strict=True))
        means = [
            (y.unsqueeze(-1).flatten(2).mean(2) - mean) / variance.clamp_min(1e-5).sqrt()
            for y, (mean, variance) in layers
        ]
        return logits, torch.cat(means, 1), *(moment_sums(y, mean) for y, (mean, _) in layers)

    logits, means, *sums = in_micro_batches(evaluate, teacher.batch_limit, images)
    batch = [moments(total, mean, len(images)) for total, (mean, _) in zip(sums, teacher.batchnorms, strict=True)]
    return logits, batch, means


class Head(nn.Module):
    """``[n, D]`` to unit vectors ``[n, WIDTH]``: two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layers(x), dim=1)


def info_nce(query: Tensor, key: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """Mean over i of −log( exp(q_i·k_i/τ) / Σ_j exp(q_i·n_j/τ) ), where n runs over all keys and the bank; a scalar.

    ``query`` and ``key`` ``[n, d]``, ``bank [m, d]``, all of unit length. The positive is among the n_j (van den Oord
    et al. 2018); equation 4 as printed leaves it out, and is then unbounded below.
    """
    scores = query @ torch.cat([key, bank]).T / temperature
    return F.cross_entropy(scores, torch.arange(len(query), device=query.device))


BETAS = (0.5, 0.999)


def seeded(build: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """A network initialized from ``seed`` alone; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build().to(device)


class Inversion:
    """Makes the images of one group: head and bank live as long as it."""

    def __init__(self, models: Models, group: Group, settings: SynthSettings, counters: Counters) -> None:
        self.models, self.group, self.settings, self.cmi = models, group, settings, settings.cmi
        self.counters = counters
        self.side = inverted_side(models.teacher, settings.images.size)
        self.bank: list[Tensor] = []  # embeddings of the batches so far
        if self.cmi.cr:
            gray = torch.zeros(2, 3, self.side, self.side, device=models.device)
            width = embedding(models.teacher, gray)[2].shape[1]
            self.head = seeded(lambda: Head(width), derive(settings.seed, "head", group.index), models.device)
            self.head_adam = torch.optim.Adam(self.head.parameters(), self.cmi.lr, BETAS)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """The contrastive space: images ``[n, 3, h, w]`` to unit vectors."""
        vectors: Tensor = self.head(embedding(self.models.teacher, images)[2])
        return vectors

    def frame(self) -> DecodedGroup:
        """All batches of the group, one after the other; ``bn`` is their mean."""
        n, count = len(self.group.trajectories), self.cmi.batches
        made = [self.batch(b, slice(n * b // count, n * (b + 1) // count)) for b in range(count)]
        terms = [best.losses for best in made]
        losses = Losses(
            torch.cat([term.ce for term in terms]),
            torch.cat([term.adversarial for term in terms]),
            torch.stack([term.bn for term in terms]).mean(),
        )
        images = torch.cat([best.images for best in made])
        return DecodedGroup(self.cmi.steps, 0, images, [[] for _ in range(n)], losses)

    def batch(self, number: int, part: slice) -> Best:
        """w_ce·CE + w_bn·BN + w_adv·ADV + w_cr·CR over generator and latents; the iterate of the lowest loss."""
        cmi, seed, teacher, device = self.cmi, self.settings.seed, self.models.teacher, self.models.device
        labels = torch.tensor(self.group.labels[part], device=device)
        generator = seeded(
            lambda: Generator(cmi.latent, cmi.width, teacher.input.channels, self.side),
            derive(seed, "generator", self.group.index, number),
            device,
        )
        z = self.group.noise(seed, (cmi.latent,))[part].to(device).requires_grad_()
        adam, best = torch.optim.Adam([*generator.parameters(), z], cmi.lr, BETAS), Best()
        for step in range(cmi.steps):
            images = as_rgb(generator(z))
            rng = torch_rng(seed, "view", self.group.index, number, step)
            shifts = draw_shifts(len(z), self.side, cmi.jitter, cmi.flip, rng)
            losses, key = self.evaluate(views(images, shifts), labels)
            loss = cmi.ce * losses.ce.mean() + cmi.bn * losses.bn
            loss = loss + self.settings.guidance.adversarial * losses.adversarial.mean()
            if cmi.cr:
                local = views(images, draw_crops(len(z), cmi.crop, cmi.flip, rng))
                loss = loss + cmi.cr * self.contrast(embedding(teacher, local)[2], key.detach())
                self.head_adam.zero_grad()
            best.offer(loss, images, losses)
            adam.zero_grad()
            loss.backward()
            adam.step()
            if cmi.cr:
                self.head_adam.step()
            self.counters.teacher_calls += 2 if cmi.cr else 1
            self.models.on_step(losses)
        images = best.checked(self.group)
        if cmi.cr:
            with torch.no_grad():
                self.bank.append(embedding(teacher, images)[2])
        return best

    def evaluate(self, images: Tensor, labels: Tensor) -> tuple[Losses, Tensor]:
        """The terms of teacher and adversary for a view, and its embedding."""
        logits, batch, embedded = embedding(self.models.teacher, images)
        adversary = self.models.adversary
        adversarial = disagreement(logits, adversary.logits(images)) if adversary else torch.zeros_like(logits[:, 0])
        bn = moments_gap(batch, self.models.teacher.batchnorms) if batch else logits.new_zeros(())
        return Losses(class_prior(logits, labels), adversarial, bn), embedded

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        """CR: local views against global ones and the bank, all seen through the head as it is now."""
        n = len(query)
        q, k, *bank = self.head(torch.cat([query, key, *self.bank])).tensor_split((n, 2 * n))
        return info_nce(q, k, bank[0], self.cmi.temperature)


def cmi(models: Models, group: Group, settings: SynthSettings, counters: Counters) -> Iterator[DecodedGroup]:
    """The images of a group, each from its own latent."""
    yield Inversion(models, group, settings, counters).frame()
