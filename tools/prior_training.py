"""What the scripts that train a text-conditional latent prior share: tokenizer, text encoder, one resumable loop."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CAPTION_DROP = 0.1  # share of captions emptied, for classifier-free guidance


def build_tokenizer(captions: list[str], folder: Path, tokens: int) -> CLIPTokenizer:
    """A CLIP BPE tokenizer fitted on the captions: whole words for our vocabulary, bytes for anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|[^\sa-z]+"), "removed", invert=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        sorted(set(captions)),
        trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>"),
    )
    learnt = json.loads(raw.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in learnt["merges"]]
    vocabulary = alphabet + [a + "</w>" for a in alphabet] + ["".join(m.split(" ")) for m in merges]
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=tokens)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """``[n, tokens]``, padded and cut to the tokenizer's length."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def save_pipeline(
    folder: Path, vae: nn.Module, unet: nn.Module, text: nn.Module, tokenizer: CLIPTokenizer, scheduler: SchedulerMixin
) -> None:
    """The prior in half precision, as a ``StableDiffusionPipeline`` folder of safetensors."""
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        unet=unet.half(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What :func:`save_checkpoint` kept; empty where there is none."""
    return torch.load(path, weights_only=True, map_location=device) if path.exists() else {}


@dataclass(frozen=True)
class Budget:
    """How long a phase trains: so many steps, or so many minutes over all its runs. Zero: not at all."""

    steps: int | None = None
    minutes: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """0 at the start, 1 or more at the end."""
        used, whole = (step, self.steps) if self.minutes is None else (seconds, 60 * self.minutes)
        return used / whole if whole else 1.0


@dataclass(frozen=True)
class Recipe:
    """AdamW with warm-up and a cosine to zero over the budget, gradients clipped at norm 1, averaged weights."""

    lr: float
    warmup: int = 200  # steps
    weight_decay: float = 1e-2
    ema: float = 0.999

    def rate(self, step: int, progress: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.lr * min(1.0, (step + 1) / self.warmup) * cosine


@dataclass
class Fitted:
    """A finished (or paused) phase: averaged weights per network, steps, seconds of training, running loss."""

    ema: dict[str, dict[str, Tensor]]
    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan

    def load_into(self, nets: dict[str, nn.Module]) -> None:
        """Put the averaged weights into ``nets``, in eval mode."""
        for key, net in nets.items():
            net.load_state_dict(self.ema[key])
            net.eval()


@contextmanager
def averaged(nets: dict[str, nn.Module], fitted: Fitted) -> Iterator[None]:
    """``nets`` with the averaged weights, in eval mode, for a look in between."""
    kept = {key: {name: value.clone() for name, value in net.state_dict().items()} for key, net in nets.items()}
    fitted.load_into(nets)
    yield
    for key, net in nets.items():
        net.load_state_dict(kept[key])
        net.train()


def fit(
    nets: dict[str, nn.Module],
    loss_of: Callable[[torch.Generator], Tensor],
    budget: Budget,
    recipe: Recipe,
    path: Path,
    report: Callable[[Fitted], str],
    every: float = 60.0,
    draws: str = "cpu",
    more: dict[str, Any] | None = None,
) -> Fitted:
    """Minimise ``loss_of(generator)`` over ``nets``; ``generator``, on the device ``draws``, is seeded by the step, so
    a resumed run draws alike. The loop itself never waits for the device.

    Every ``every`` seconds and at the end the state, ``more`` beside it, is kept at ``path`` and a line with ``report``
    is printed; a second call goes on from there.
    """
    parameters = [p for net in nets.values() for p in net.parameters()]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.99), fused=device.type == "cuda" or None
    )
    fitted = Fitted({k: {n: v.detach().clone() for n, v in net.state_dict().items()} for k, net in nets.items()})
    if state := load_checkpoint(path, device):
        for key, net in nets.items():
            net.load_state_dict(state["nets"][key])
        optimizer.load_state_dict(state["optimizer"])
        fitted = Fitted(state["ema"], state["step"], state["seconds"], state["loss"])
    averaged = [fitted.ema[key][name] for key, net in nets.items() for name, _ in net.named_parameters()]
    begun, before, reported = fitted.step, fitted.seconds, fitted.seconds
    running = torch.tensor(fitted.loss, device=device)
    for net in nets.values():
        net.train()
    started = time.monotonic()
    while (progress := budget.progress(fitted.step, fitted.seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(fitted.step, progress)
        loss = loss_of(torch.Generator(draws).manual_seed(fitted.step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(recipe.ema, (1 + fitted.step) / (10 + fitted.step))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
        loss = loss.detach()
        running = torch.where(running.isnan(), loss, 0.98 * running + 0.02 * loss)
        fitted.step += 1
        fitted.seconds = before + time.monotonic() - started
        if fitted.seconds - reported >= every or budget.progress(fitted.step, fitted.seconds) >= 1:
            reported, fitted.loss = fitted.seconds, running.item()
            states = {key: net.state_dict() for key, net in nets.items()}
            kept = {"nets": states, "optimizer": optimizer.state_dict(), "ema": fitted.ema, "step": fitted.step}
            save_checkpoint(path, (more or {}) | kept | {"seconds": fitted.seconds, "loss": fitted.loss})
            pace = (fitted.seconds - before) / (fitted.step - begun)
            done = budget.progress(fitted.step, fitted.seconds)
            print(
                f"{path.stem} step {fitted.step} ({done:.0%}) loss {fitted.loss:.4f} {pace:.3f} s/step "
                f"{report(fitted)}",
                flush=True,
            )
    return fitted
