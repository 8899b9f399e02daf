"""CMI (Fang et al. 2021): a generator for each batch, trained with a contrastive term that keeps images apart.

A group is made in batches; the memory bank holds its earlier ones and never those of another group, which is the unit
of determinism. ``dda`` starts from these images.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from stages.seeds import derive
from stages.synth.contrastive import Head, embedding, info_nce
from stages.synth.crops import draw_crops, draw_shifts, views
from stages.synth.generator import Generator
from stages.synth.groups import Group
from stages.synth.guidance import Losses, class_prior, disagreement, moments_gap
from stages.synth.inversion import Best, as_rgb, inverted_side
from stages.synth.sampler import Frame, Models, Work
from stages.synth.seeds import torch_rng
from stages.synth.settings import SynthSettings

BETAS = (0.5, 0.999)


def seeded(build: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """A network initialised from ``seed`` alone; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build().to(device)


class Inversion:
    """Makes the images of one group: head and bank live as long as it."""

    def __init__(self, models: Models, group: Group, settings: SynthSettings, work: Work) -> None:
        self.models, self.group, self.settings, self.own, self.work = models, group, settings, settings.cmi, work
        self.side = inverted_side(models.teacher, settings.images.size)
        self.bank: list[Tensor] = []  # embeddings of the batches so far
        if self.own.cr:
            blank = torch.zeros(2, 3, self.side, self.side, device=models.device)
            inputs = embedding(models.teacher, blank)[2].shape[1]
            self.head = seeded(lambda: Head(inputs), derive(settings.seed, "head", group.index), models.device)
            self.head_adam = torch.optim.Adam(self.head.parameters(), self.own.lr, BETAS)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """The contrastive space: images ``[n, 3, h, w]`` to unit vectors."""
        vectors: Tensor = self.head(embedding(self.models.teacher, images)[2])
        return vectors

    def frame(self) -> Frame:
        """All batches of the group, one after the other; ``bn`` is their mean."""
        n, count = len(self.group.trajectories), self.own.batches
        made = [self.batch(b, slice(n * b // count, n * (b + 1) // count)) for b in range(count)]
        terms = [best.losses for best in made]
        losses = Losses(
            torch.cat([term.ce for term in terms]),
            torch.cat([term.adversarial for term in terms]),
            torch.stack([term.bn for term in terms]).mean(),
        )
        images = torch.cat([best.images for best in made])
        return Frame(self.own.steps, 0, images, [[] for _ in range(n)], losses)

    def batch(self, number: int, part: slice) -> Best:
        """w_ce·CE + w_bn·BN + w_adv·ADV + w_cr·CR over generator and latents; the iterate of the lowest loss."""
        own, seed, teacher, device = self.own, self.settings.seed, self.models.teacher, self.models.device
        labels = torch.tensor(self.group.labels[part], device=device)
        generator = seeded(
            lambda: Generator(own.latent, own.width, teacher.input.channels, self.side),
            derive(seed, "generator", self.group.index, number),
            device,
        )
        z = self.group.noise(seed, (own.latent,))[part].to(device).requires_grad_()
        adam, best = torch.optim.Adam([*generator.parameters(), z], own.lr, BETAS), Best()
        for step in range(own.steps):
            images = as_rgb(generator(z))
            rng = torch_rng(seed, "view", self.group.index, number, step)
            losses, key = self.look(views(images, draw_shifts(len(z), self.side, own.shift, own.flip, rng)), labels)
            loss = own.ce * losses.ce.mean() + own.bn * losses.bn
            loss = loss + self.settings.guidance.adversarial * losses.adversarial.mean()
            if own.cr:
                local = views(images, draw_crops(len(z), own.crop, own.flip, rng))
                loss = loss + own.cr * self.contrast(embedding(teacher, local)[2], key.detach())
                self.head_adam.zero_grad()
            best.offer(loss, images, losses)
            adam.zero_grad()
            loss.backward()
            adam.step()
            if own.cr:
                self.head_adam.step()
            self.work.teacher_calls += 2 if own.cr else 1
        images = best.checked(self.group)
        if own.cr:
            with torch.no_grad():
                self.bank.append(embedding(teacher, images)[2])
        return best

    def look(self, images: Tensor, labels: Tensor) -> tuple[Losses, Tensor]:
        """What teacher and adversary say of a view, and its embedding."""
        logits, batch, embedded = embedding(self.models.teacher, images)
        adversary = self.models.adversary
        against = disagreement(logits, adversary.logits(images)) if adversary else torch.zeros_like(logits[:, 0])
        bn = moments_gap(batch, self.models.teacher.batchnorms) if batch else logits.new_zeros(())
        return Losses(class_prior(logits, labels), against, bn), embedded

    def contrast(self, query: Tensor, key: Tensor) -> Tensor:
        """CR: local views against global ones and the bank, all seen through the head as it is now."""
        n = len(query)
        q, k, *bank = self.head(torch.cat([query, key, *self.bank])).tensor_split((n, 2 * n))
        return info_nce(q, k, bank[0], self.own.temperature)


def cmi(models: Models, group: Group, settings: SynthSettings, work: Work) -> Iterator[Frame]:
    """The images of a group, each from its own latent."""
    yield Inversion(models, group, settings, work).frame()
