"""Networks that come from elsewhere: ``timm:``, ``torchvision:``, ``hf:`` and the user's own code.

They return plain logits like ours (a hook unpacks other outputs), and :mod:`stages.models.taps` finds their head and
stages. Nothing is downloaded here, and no code of a model repository is run.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifests.errors import DataError, UsageError
from stages.models.identity import ModelConfig
from stages.models.outputs import logits_of
from stages.models.own_configs import fetch
from stages.models.schemes import source_file, split_name
from stages.models.stem import adapt
from stages.models.taps import mark


def build_foreign(config: ModelConfig) -> nn.Module:
    """A freshly initialised network of a scheme other than ours."""
    scheme, rest = split_name(config.architecture)
    if scheme == "code":
        made = call_code(config)
        if not isinstance(made, nn.Module):
            raise UsageError(f"'{rest}' returns {type(made).__name__}: expected a torch.nn.Module")
        return finish(made, config)
    if scheme == "onnx":
        raise UsageError(f"'{rest}' is a black box: it scores images as a teacher, and nothing else")
    if scheme == "hf":
        return finish(_hf(config, None, rest), config)
    net = _timm(rest, config) if scheme == "timm" else _torchvision(rest, config)
    done = adapt(net, config.channels, config.input.size) if config.stem == "small" else ""
    net.__dict__["adaptation"] = done
    return finish(net, config)


def build_hf(config: ModelConfig, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """A transformers classifier in float32 around ``state``, whose names may be those of older versions."""
    return finish(_hf(config, state, where), config)


def finish(net: nn.Module, config: ModelConfig) -> nn.Module:
    """Make a foreign network return plain logits, and mark it for the taps."""
    what, classes = f"'{config.architecture}'", config.num_classes
    if not hasattr(net, "stages") or not isinstance(getattr(net, "head", None), str):
        mark(net, classes, (config.channels, config.input.size, config.input.size))
    net.register_forward_hook(lambda _module, _inputs, out: logits_of(out, classes, what))
    return net


def call_code(config: ModelConfig) -> Any:
    """What the user's ``module.path:function`` returns; it receives ``num_classes`` and ``channels`` if it names them.

    The module is looked for in the current folder first. Raises UsageError where it cannot be imported or called.
    """
    name = config.architecture
    module_name, _, function_name = name.partition(":")
    file = source_file(name)
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does
        raise UsageError(f"'{name}': importing {file} fails: {type(error).__name__}: {_line(error)}") from error
    finally:
        sys.path.remove(here)
    if Path(str(module.__file__)).resolve() != file.resolve():
        raise UsageError(f"'{name}': {module_name} is {module.__file__} here, not {file}; rename your module")
    function = getattr(module, function_name, None)
    if not callable(function):
        there = ", ".join(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise UsageError(f"'{name}': {file} has no function {function_name}; it has {there or 'none'}")
    try:
        wanted = inspect.signature(function).parameters
        arguments = {"num_classes": config.num_classes, "channels": config.channels}
        return function(**{key: value for key, value in arguments.items() if key in wanted})
    except Exception as error:  # whatever the user's function does
        raise UsageError(f"'{name}' fails: {type(error).__name__}: {_line(error)}") from error


def _timm(name: str, config: ModelConfig) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UsageError(f"'timm:{name}' needs timm: pip install 'dfkd-factory[timm]'") from None
    if not timm.is_model(name):  # also refuses timm's own hf-hub: and local-dir: names, which fetch or read files
        stem = name.split(".")[0]
        near = timm.list_models(f"{stem[:6]}*")[:3] if stem.isidentifier() else []
        raise UsageError(f"timm has no model '{name}'" + (f": did you mean {', '.join(near)}?" if near else ""))
    fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
    size = {"img_size": config.input.size} if fixed else {}
    return _made(timm.create_model, name, pretrained=False, num_classes=config.num_classes,
                 in_chans=config.channels, **size)  # fmt: skip


def _torchvision(name: str, config: ModelConfig) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        near = models.list_models(module=models, include=f"{name[:6]}*")[:3]
        raise UsageError(
            f"torchvision has no classifier '{name}'" + (f": did you mean {', '.join(near)}?" if near else "")
        )
    arguments: dict[str, Any] = {"num_classes": config.num_classes}
    if name.startswith("vit_"):
        arguments["image_size"] = config.input.size
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": True}
    net = _made(models.get_model, name, weights=None, **arguments)
    if config.channels != 3:
        path, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
        kept = {key: getattr(first, key) for key in ("kernel_size", "stride", "padding", "dilation")}
        net.set_submodule(path, nn.Conv2d(config.channels, first.out_channels, bias=first.bias is not None, **kept))
    return net


def _hf(config: ModelConfig, state: Mapping[str, Tensor] | None, where: str) -> nn.Module:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    from transformers.utils import logging

    folder = fetch(split_name(config.architecture)[1], "classifier")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        own = AutoConfig.from_pretrained(folder, trust_remote_code=False, num_labels=config.num_classes)
        for key, value in (("num_channels", config.channels), ("image_size", config.input.size)):
            if isinstance(getattr(own, key, None), int):
                setattr(own, key, value)
        kind: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(own)]
        if state is None:
            return _made(kind, own)
        net, told = kind.from_pretrained(
            None, config=own, state_dict=dict(state), dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except KeyError:
        raise UsageError(f"{folder}: transformers has no image classifier of type '{own.model_type}'") from None
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"{folder} cannot be built by transformers: {_line(error)}") from None
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    for what, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("shape", "mismatched_keys")):
        if told.get(key):
            found = sorted(str(entry) for entry in told[key])
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise DataError(f"{where} does not fit {kind.__name__}: {what}: {', '.join(found[:4])}{more}")
    out: nn.Module = net
    return out


def _made(builder: Callable[..., Any], *args: Any, **arguments: Any) -> nn.Module:
    try:
        net: nn.Module = builder(*args, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        what = args[0] if isinstance(args[0], str) else builder.__name__
        raise UsageError(f"'{what}' cannot be built with {arguments}: {_line(error)}") from error
    return net


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
