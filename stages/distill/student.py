"""One student in training: network, optimizer, learning rate, averaged weights. Independent of the other students."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from manifests.errors import FactoryError
from stages.distill.batches import Batch
from stages.distill.losses import AlignHead, Targets, align_head, student_terms, weighted
from stages.distill.runtime import ALONE, Ranks, autocast
from stages.models import build
from stages.models.inputs import finite
from stages.models.source import ModelConfig
from stages.models.teacher import Teacher
from stages.seeds import derive
from stages.settings import DistillSettings, OptimizerSettings, student_name


def lr_factor(settings: OptimizerSettings, step: int, total: int) -> float:
    """Share of the peak learning rate at ``step`` (0 … total − 1): a pure function, so there is nothing to resume.

    cosine and step: linear warm-up, then half a cosine to 0, or ``gamma`` at each milestone. onecycle: as PyTorch's
    OneCycleLR (Smith and Topin 2017), a cosine from 1/25 up to 1 over ``warmup``, then one down to 1/25 · 1/10,000.
    """
    if settings.schedule == "onecycle":
        peak, last = settings.warmup * total - 1, total - 1
        if peak > 0 and step <= peak:
            return _cosine(1 / 25, 1.0, step / peak)
        return _cosine(1.0, 1 / 25 / 1e4, (step - peak) / (last - peak))
    rising = math.ceil(settings.warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if settings.schedule == "step":
        return settings.gamma ** sum(step / total >= milestone for milestone in settings.milestones)
    return _cosine(1.0, 0.0, (step - rising) / (total - rising))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def build_optimizer(net: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; weight decay on matrices and kernels only."""
    groups = parameter_groups(net, settings)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, settings.lr, betas=(settings.momentum, 0.999))
    return torch.optim.SGD(groups, settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def parameter_groups(net: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """What decays, and what does not."""
    return [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Diverged(FactoryError):
    """A student that cannot go on: its loss or gradient is not finite any more."""


class Student:
    """A network that learns. Everything random about it follows from (seed, its name, the step, the rank)."""

    def __init__(self, config: ModelConfig, settings: DistillSettings, device: torch.device, ranks: Ranks = ALONE):
        self.config, self.settings, self.ranks = config, settings, ranks
        self.name = student_name(config.architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(settings.seed, "init", self.name))
            self.net = build.build_net(config).to(device)
            build.check_runs(self.net, config)
        if settings.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.forward: Any = torch.compile(self.net) if settings.compile else self.net
        self.layers: list[str] = []  # for Grad-CAM, set by the run
        self.align: AlignHead | None = None  # for loss.feature
        self.optimizer = build_optimizer(self.net, settings.optimizer)
        self.average = copy.deepcopy(self.net).requires_grad_(False).eval() if settings.optimizer.ema else None
        self.sums: dict[str, float] = {}  # of the epoch: every term and the loss, over images, and their number
        self.metrics: list[dict[str, float]] = []  # one entry an epoch
        self.best = -1.0  # highest val_agreement so far
        self.best_weights: dict[str, Tensor] = {}  # those of then
        self.parked: str | None = None  # why it takes no further part

    def attach_head(self, teacher: Teacher) -> None:
        """Learn a head for ``loss.feature``, too. Raises UsageError where one of both networks has no last map."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.settings.seed, "align", self.name))
            self.align = align_head(teacher, self.net).to(next(self.net.parameters()).device)
        for group in parameter_groups(self.align, self.settings.optimizer):
            self.optimizer.add_param_group(group)

    @property
    def trained(self) -> nn.Module:
        """Everything that learns: the network, and its head where there is one."""
        return self.net if self.align is None else nn.ModuleList([self.net, self.align])

    @property
    def result(self) -> nn.Module:
        """The network that counts: averaged weights where there are any. In eval mode."""
        return self.average if self.average is not None else self.net.eval()

    @property
    def finite(self) -> bool:
        """Whether every weight and running statistic is finite."""
        return finite(self.net) and (self.average is None or finite(self.average))

    def learn(self, x: Tensor, batch: Batch, targets: Targets, step: int, total: int) -> None:
        """One optimizer step on ``x``, this process's part of the batch as the student's input.

        Raises Diverged if the loss of the whole batch, or its gradient, is not finite.
        """
        settings = self.settings
        salt = [self.ranks.rank] if self.ranks.rank else []
        torch.manual_seed(derive(settings.seed, "step", self.name, step, *salt))  # for dropout and the like
        self.net.train()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with autocast(settings.dtype, x.device):
            terms = student_terms(self.forward, x, batch, targets, settings.loss, self.layers, self.align)
            loss = weighted(terms, settings.loss)
        loss.backward()
        part = torch.stack([loss.detach(), *(term.detach() for term in terms.values())])
        values = self.ranks.add_up(self.trained, part, batch.share).tolist()
        if not math.isfinite(values[0]):
            raise Diverged(f"loss is {values[0]} at step {step}; a smaller learning rate or optimizer.clip may help")
        if settings.optimizer.clip:
            norm = nn.utils.clip_grad_norm_(self.trained.parameters(), settings.optimizer.clip)
            if not math.isfinite(norm.item()):
                raise Diverged(f"gradients are not finite at step {step}; a smaller learning rate may help")
        for group in self.optimizer.param_groups:
            group["lr"] = settings.optimizer.lr * lr_factor(settings.optimizer, step, total)
        self.optimizer.step()
        self._update_average(step)
        for name, value in zip(("images", "loss", *terms), (1.0, *values), strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value * batch.count

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        """Move the averaged weights; the decay grows from 0.1, so that early steps are soon forgotten."""
        if self.average is None:
            return
        decay = min(self.settings.optimizer.ema, (1 + step) / (10 + step))
        pairs = list(zip(self.average.state_dict().values(), self.net.state_dict().values(), strict=True))
        means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(means, values, 1 - decay)  # one kernel for all on a GPU
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value)

    def take_means(self) -> dict[str, float]:
        """Mean of the loss and of every term since the last call."""
        sums, self.sums = self.sums, {}
        return {name: value / sums["images"] for name, value in sums.items() if name != "images"}

    def keep_best(self, val_agreement: float) -> None:
        """Keep the present weights if no earlier epoch's agree better with the teacher on the validation images."""
        if val_agreement >= self.best:
            self.best = val_agreement
            self.best_weights = {name: value.clone() for name, value in self.result.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Everything that training on needs, as tensors and plain values."""
        return {
            "net": self.net.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": dict(self.sums),
            "metrics": list(self.metrics),
            "best": self.best,
            "best_weights": dict(self.best_weights),
            "parked": self.parked,
            **({} if self.align is None else {"align": self.align.state_dict()}),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`. Raises what torch raises, or TypeError, for anything else."""
        kinds: dict[str, Any] = dict.fromkeys(("net", "optimizer", "sums", "best_weights"), dict)
        kinds |= {"metrics": list, "best": float, "parked": str | None}
        wrong = [name for name, kind in kinds.items() if not isinstance(state[name], kind)]
        if wrong or not all(map(_is_metrics, state["metrics"])):
            raise TypeError(f"{', '.join(wrong) or 'metrics'} of {self.name} has another type")
        self.net.load_state_dict(state["net"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.align is not None:
            self.align.load_state_dict(state["align"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums, self.metrics = dict(state["sums"]), list(state["metrics"])
        self.best, self.best_weights, self.parked = state["best"], state["best_weights"], state["parked"]


def _is_metrics(line: Any) -> bool:
    return isinstance(line, dict) and "epoch" in line and all(isinstance(v, int | float) for v in line.values())
