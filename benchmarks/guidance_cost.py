"""What guidance costs on the embedded prior: unguided, ours, and the published algorithm; then where the time goes.

    python benchmarks/guidance_cost.py [--rounds 3] [--json cost.json]

Same prior, steps and noise in every row, from the first latent to the final image, in CPU seconds of one thread (other
work on the machine then hardly counts; it does in "elapsed"). Rows take turns in each round, the median round counts.
"Published": DiffDFKD as written, one image at a time, gradient through the denoiser at every step by way of the full
VAE, and eps computed a second time, with its graph, after every update. The breakdown is of one shard, written out.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from manifests.shard import ShardWriter
from pipeline.recipe import resolve
from stages.settings import SynthSettings
from stages.synth import images as image_writer
from stages.synth.group import Group, make_group
from stages.synth.guidance import Guidance
from stages.synth.priors.schedule import State
from stages.synth.sampler import Counters, Models, diffdfkd, dmkd
from stages.synth.worker import ShardWorker, load_models

EVERY = "guidance.interval=[0.0,1.0]"
FULL, FITTED = "guidance.decoder=full", "guidance.decoder=fitted"
ROWS: dict[str, list[str]] = {
    "unguided": ["method=dmkd"],
    "full VAE, default interval": [FULL],
    "full VAE, every step": [FULL, EVERY],
    "fitted decoder, default interval": [FITTED],
    "fitted decoder, every step": [FITTED, EVERY],
}
PUBLISHED = "published, one image at a time"


def settings(sets: list[str], size: int) -> SynthSettings:
    return resolve("demo", sets=[f"synth.{s}" for s in (*sets, f"group_size={size}", "device=cpu")]).synth


def sample(models: Models, group: Group, chosen: SynthSettings) -> int:
    """A group by the code that ``factory run synth`` runs; the number of its images."""
    method = dmkd if chosen.method == "dmkd" else diffdfkd
    (frame,) = method(models, group, chosen, Counters())
    return len(frame.images)


def published(models: Models, group: Group, chosen: SynthSettings, images: int) -> int:
    """The algorithm as written, for the first ``images`` of the group."""
    prior, noise = models.prior, group.noise(chosen.seed, models.prior.latent_shape).to(models.device)
    labels = torch.tensor(group.labels, device=models.device)
    for i in range(images):
        guide = Guidance(prior, models.teacher, labels[i : i + 1], chosen.guidance)
        condition = prior.encode(group.conditions(prior.conditioning)[i : i + 1])
        state = prior.start(noise[i : i + 1])
        for step in range(len(prior.timesteps)):
            state.z.requires_grad_()
            losses = guide.terms(prior.decode(prior.predict(state, condition).z0), torch.Generator())
            (gradient,) = torch.autograd.grad(losses.total(chosen.guidance), state.z)
            moved = State((state.z - chosen.guidance.step_size * gradient).detach().requires_grad_(), step)
            state = prior.step(prior.predict(moved, condition).detached())
        prior.decode(state.z)
    return images


def clocked(call: Callable[[], int]) -> dict[str, float]:
    started, elapsed = time.process_time(), time.perf_counter()
    images = call()
    return {"cpu": (time.process_time() - started) / images, "elapsed": (time.perf_counter() - elapsed) / images}


def compare(size: int, single: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of an image in each row."""
    calls: dict[str, Callable[[], int]] = {}
    for name, sets in ROWS.items():
        chosen = settings(sets, size)
        models = load_models(chosen)
        group = make_group(chosen, 0, models.teacher.class_names)
        calls[name] = lambda m=models, g=group, c=chosen: sample(m, g, c)  # type: ignore[misc]
    raw = chosen.model_copy(
        update={"guidance": chosen.guidance.model_copy(update={"normalize": "none", "step_size": 1e-3})}
    )
    calls[PUBLISHED] = lambda: published(models, group, raw, single)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(clocked(call))
    return {name: {key: median(r[key] for r in made) for key in ("cpu", "elapsed")} for name, made in found.items()}


class Clock:
    """CPU seconds of each thread inside named calls, nested ones counted for the inner name alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.thread = threading.local()

    def watch(self, owner: Any, method: str, name: Callable[[], str]) -> None:
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            label, before, self.thread.inner = name(), getattr(self.thread, "inner", 0.0), 0.0
            started = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.thread_time() - started
                self.seconds[label] += spent - self.thread.inner
                self.thread.inner = before + spent

        setattr(owner, method, call)


@contextmanager
def restored(*places: tuple[Any, str]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def breakdown(sets: list[str], size: int) -> dict[str, float]:
    """Share of CPU time by stage while one shard of one group is made and committed."""
    chosen = settings([*sets, "groups_per_shard=1"], size)
    global_places = [
        (torch.autograd, "grad"),
        (image_writer, "encode_image"),
        (ShardWriter, "add"),
        (ShardWriter, "commit"),
    ]
    with tempfile.TemporaryDirectory() as folder, restored(*global_places):
        worker, clock = ShardWorker(chosen, folder, "0" * 64), Clock()
        prior, teacher = worker.models.prior, worker.teacher
        prior.encode(make_group(chosen, 0, teacher.class_names).prompts)  # once a prompt, not once an image
        guiding = torch.is_grad_enabled  # only guidance decodes and asks with gradients
        clock.watch(prior, "predict", lambda: "prior")
        clock.watch(prior, "decode", lambda: "guidance decoder" if guiding() else "decoding stored images")
        if worker.models.decode is not None:
            clock.watch(worker.models.decode, "forward", lambda: "guidance decoder")
        clock.watch(teacher.net, "forward", lambda: "teacher" if guiding() else "scoring stored images")
        clock.watch(torch.autograd, "grad", lambda: "backward")
        clock.watch(image_writer, "encode_image", lambda: "encode")
        clock.watch(ShardWriter, "add", lambda: "write")
        clock.watch(ShardWriter, "commit", lambda: "write")
        started = time.process_time()
        worker.run(0)
        total = time.process_time() - started
    shares = {name: seconds / total for name, seconds in clock.seconds.items()}
    return shares | {"everything else": 1 - sum(shares.values()), "CPU ms / image": 1000 * total / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=50, help="guided together, and counted, in every row but the last"
    )
    parser.add_argument("--single", type=int, default=3, help="images of the published algorithm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = compare(args.images, args.single, args.rounds)
    base, slow = found["unguided"]["cpu"], found[PUBLISHED]["cpu"]
    print("| row | images / CPU s | of unguided | × published | elapsed s / image |\n|---|---|---|---|---|")
    for name, row in found.items():
        rates = f"{1 / row['cpu']:.2f} | {base / row['cpu']:.2f} | {slow / row['cpu']:.1f}"
        print(f"| {name} | {rates} | {row['elapsed']:.3f} |")
    wanted = ("unguided", "full VAE, default interval", "fitted decoder, default interval")
    shares = {name: breakdown(ROWS[name], args.images) for name in wanted}
    stages = list(dict.fromkeys(stage for row in shares.values() for stage in row))
    print(f"\n| CPU time of a shard | {' | '.join(shares)} |\n|{'---|' * (1 + len(shares))}")
    for stage in sorted(stages, key=lambda s: (s == "CPU ms / image", -max(r.get(s, 0) for r in shares.values()))):
        values = [row.get(stage, 0.0) for row in shares.values()]
        shown = [f"{value:.1f}" if "ms" in stage else f"{value:.1%}" for value in values]
        print(f"| {stage} | {' | '.join(shown)} |")
    if args.json:
        args.json.write_text(json.dumps({"seconds": found, "shares": shares}, indent=1))


if __name__ == "__main__":
    main()
