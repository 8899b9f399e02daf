"""Fit a third-party CIFAR-10 classifier to JPEG images and save it as a model folder.

    python tools/train_cifar_teacher.py --weights cifar10-resnet20.safetensors --images cifar10-train.parquet \
        --out build/cifar10-teacher --work build/cifar10-teacher-work --minutes 20

Fine-tunes with random shifts and mirror images on 45,000 rows; 5,000 rows are held back for validation (the same that
``benchmarks/cifar10.py`` tunes on). Averaged weights, BatchNorm statistics recomputed for the average. Resumable.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_data import INPUT, split_table, tensors, third_party
from prior_training import Budget, Fitted, Recipe, fit
from torch import Tensor, nn

from stages.models.inputs import InputSpec
from stages.models.loading import build_from, save_model
from stages.models.source import resolve

SHIFT = 4  # pixels


def centred(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[n, 3, 32, 32]`` shifted by up to four pixels (reflected edges), half of them mirrored.

    ``generator`` is on their device.
    """
    n, side = len(x), x.shape[-1]
    padded, draws = F.pad(x, (SHIFT,) * 4, mode="reflect"), {"generator": generator, "device": x.device}
    dy, dx = torch.randint(2 * SHIFT + 1, (2, n), **draws)
    steps, rows = torch.arange(side, device=x.device), torch.arange(n, device=x.device)[:, None, None]
    columns = torch.where(torch.rand(n, 1, **draws) < 0.5, steps, steps.flip(0)) + dx[:, None]
    return padded[rows, :, (steps + dy[:, None])[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor, spec: InputSpec) -> float:
    net.eval()
    found = torch.cat([net(spec(centred(part))).argmax(1) for part in images.split(500)])
    return 100 * (found == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--architecture", default="resnet20")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    source = resolve(third_party(args.architecture, args.weights))
    net = build_from(source.config, source.read(), source.where).to(args.device)
    spec = InputSpec(INPUT)
    images, labels = (t.to(args.device) for t in tensors(split_table(args.images, "train")))
    held, held_labels = (t.to(args.device) for t in tensors(split_table(args.images, "validation")))
    print(f"validation before: {accuracy(net, held, held_labels, spec):.2f} %", flush=True)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (args.batch,), generator=generator, device=args.device)
        return F.cross_entropy(net(spec(augmented(centred(images[rows]), generator))), labels[rows])

    def report(fitted: Fitted) -> str:
        found = f"validation {accuracy(net, held[:1000], held_labels[:1000], spec):.1f} % of 1,000"
        net.train()
        return found

    recipe = Recipe(lr=args.lr, warmup=100, weight_decay=5e-4, ema=0.995)
    budget, path = Budget(minutes=args.minutes), args.work / "teacher.pt"
    fitted = fit({"net": net}, loss_of, budget, recipe, path, report, draws=args.device)
    fitted.load_into({"net": net})
    generator = torch.Generator(args.device).manual_seed(0)
    views = (spec(augmented(centred(part), generator)) for part in images[:10_000].split(500))
    torch.optim.swa_utils.update_bn(views, net)
    score = accuracy(net, held, held_labels, spec)
    save_model(args.out, net.cpu().eval(), source.config)
    passes = fitted.step * args.batch / len(images)
    print(f"saved {args.out}: validation {score:.2f} %, {fitted.step} steps ({passes:.1f} passes)", flush=True)


if __name__ == "__main__":
    main()
