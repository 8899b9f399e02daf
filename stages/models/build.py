"""Networks by name: the built-in ones, and those of timm, torchvision, transformers and the user's own code.

Used for students named ``timm:…`` or ``torchvision:…``, and for teachers with ``stem: small``.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifests.errors import DataError, UsageError
from stages.models import nets
from stages.models.hooks import mark
from stages.models.inputs import logits_of
from stages.models.nets import DigitsCNN, ResNetCifar, Vgg11, WideResNet, group_norm
from stages.models.source import IMAGENET_NETS, ModelConfig, check_stored, fetch, resolve, source_file, split_name
from stages.models.teacher import Teacher
from stages.settings import ModelSettings, Stem


def adapt(net: nn.Module, channels: int, size: int) -> str:
    """Take two halvings out of ``net``'s first layers, in place; returns what was done in words, empty if nothing.

    First the first convolution (3×3 of stride 1, as in CIFAR ResNets), then the max pooling of the stem, or else the
    next convolution with a stride if the network still runs. Patch embeddings stay as they are. The outcome follows
    from the architecture alone.
    """
    convolutions = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        return ""
    name, first = convolutions[0]
    if first.stride[0] < 2 or first.kernel_size[0] <= first.stride[0] or first.groups > 1:
        return ""
    kernel = min(3, first.kernel_size[0])
    layer = nn.Conv2d(channels, first.out_channels, kernel, 1, kernel // 2, bias=first.bias is not None)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    net.set_submodule(name, layer)
    done = [f"{name}: {kernel}×{kernel} of stride 1"]
    pool = _stem_pool(net)
    if pool:
        net.set_submodule(pool, nn.Identity())
        done.append(f"{pool}: left out")
    else:
        strided = [(n, m) for n, m in convolutions[1:] if m.stride[0] == 2]
        if strided and _runs_with_stride_one(net, strided[0][1], channels, size):
            done.append(f"{strided[0][0]}: stride 1")
    return "; ".join(done)


def _stem_pool(net: nn.Module) -> str:
    """The max pooling that no more than three convolutions precede."""
    convolutions = 0
    for name, module in net.named_modules():
        convolutions += isinstance(module, nn.Conv2d)
        if convolutions > 3:
            return ""
        if isinstance(module, nn.MaxPool2d) and convolutions and module.stride in (2, (2, 2)):
            return name
    return ""


def _runs_with_stride_one(net: nn.Module, layer: nn.Conv2d, channels: int, size: int) -> bool:
    """Set ``layer``'s stride to 1, or leave it where the network does not run so (a parallel shortcut strides too)."""
    before, training = layer.stride, net.training
    layer.stride = (1, 1)
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, channels, size, size))
    except RuntimeError:
        layer.stride = before
        return False
    finally:
        net.train(training)
    return True


# Networks that come from elsewhere: ``timm:``, ``torchvision:``, ``hf:`` and the user's own code.
#
# They return plain logits like ours (a hook unpacks other outputs), and :mod:`stages.models.hooks` finds their head and
# stages. Nothing is downloaded here, and no code of a model repository is run.


def build_foreign(config: ModelConfig) -> nn.Module:
    """A freshly initialized network of a scheme other than ours."""
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


# Architectures by name: the built-in ones, and the way to those of timm, torchvision, transformers and users.
#
# Every built-in network has ``stages``, the module paths of its stage outputs, and ``head``, the path of its last
# linear layer: feature taps and class activation maps use them (other networks: see :mod:`stages.models.hooks`).


_BUILDERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "digits-cnn": lambda classes, channels, _: DigitsCNN(classes, channels, 32, (3, 2)),
    "digits-cnn-small": lambda classes, channels, _: DigitsCNN(classes, channels, 16, (2, 2)),
    "resnet8": lambda classes, channels, _: ResNetCifar(classes, channels, 1),
    "resnet8-gn": lambda classes, channels, _: ResNetCifar(classes, channels, 1, group_norm),
    "resnet20": lambda classes, channels, _: ResNetCifar(classes, channels, 3),
    "resnet32": lambda classes, channels, _: ResNetCifar(classes, channels, 5),
    "resnet44": lambda classes, channels, _: ResNetCifar(classes, channels, 7),
    "resnet56": lambda classes, channels, _: ResNetCifar(classes, channels, 9),
    "resnet18": lambda classes, channels, small: nets.resnet(classes, channels, small, [2, 2, 2, 2]),
    "resnet34": lambda classes, channels, small: nets.resnet(classes, channels, small, [3, 4, 6, 3]),
    "vgg11": Vgg11,
    "wrn-16-1": lambda classes, channels, _: WideResNet(classes, channels, 16, 1),
    "wrn-16-2": lambda classes, channels, _: WideResNet(classes, channels, 16, 2),
    "wrn-40-1": lambda classes, channels, _: WideResNet(classes, channels, 40, 1),
    "wrn-40-2": lambda classes, channels, _: WideResNet(classes, channels, 40, 2),
    "mobilenetv2": nets.mobilenet_v2,
    "shufflenetv2": nets.shufflenet_v2,
}


def names() -> tuple[str, ...]:
    """Every built-in architecture."""
    return tuple(_BUILDERS)


def build(name: str, num_classes: int, channels: int = 3, stem: Stem = "native") -> nn.Module:
    """A freshly initialized built-in network (from torch's global random state).

    ``stem``: ``small`` keeps the resolution in the first layers of ImageNet networks; others have none to change.
    Raises UsageError naming near matches for an unknown name.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=3) or list(_BUILDERS)
        raise UsageError(f"unknown architecture '{name}': did you mean {', '.join(near)}?")
    return _BUILDERS[name](num_classes, channels, stem == "small")


def build_net(config: ModelConfig, named: bool = False) -> nn.Module:
    """A freshly initialized network of any scheme, as ``config`` describes it.

    ``named`` tells that the user wrote the name; one from a file must not run foreign code. ``net.adaptation`` says
    in words what a small stem changed, empty where nothing. Raises UsageError where it cannot be built.
    """
    scheme, _ = split_name(config.architecture)
    if not named:
        check_stored(config.architecture, "the stored config")
    if scheme != "builtin":
        return build_foreign(config)
    net = build(config.architecture, config.num_classes, config.channels, config.stem)
    small = config.stem == "small" and config.architecture in IMAGENET_NETS
    family = config.architecture.rstrip("v0123456789")
    net.__dict__["adaptation"] = nets.SMALL_STEM[family] if small else ""
    return net


def adaptation_of(net: nn.Module) -> str:
    """What was changed in the stem for small images, in words; empty where nothing was."""
    return str(net.__dict__.get("adaptation", ""))


# A classifier without its weights, by default shapes alone on the meta device: for counting what it costs.


def blank_teacher(settings: ModelSettings, device: str = "meta") -> Teacher | None:
    """The classifier that ``settings`` name, ready for meta tensors; None for a black box, whose inside is unknown.

    On another ``device`` its weights are random. Reads its configuration, never its weights. Raises UsageError where it
    cannot be built.
    """
    source = resolve(settings)
    return blank(source.config, source.named, device)


def blank(config: ModelConfig, named: bool = False, device: str = "meta") -> Teacher | None:
    """As :func:`blank_teacher`, from a config; ``named`` tells that the user wrote the name, so that it may be code."""
    scheme, _ = split_name(config.architecture)
    if scheme == "onnx" and named:
        return None
    if scheme == "code" and named:  # may build its network from files, which a default device would break
        made = call_code(config)
        if not isinstance(made, nn.Module):
            return None
        net = finish(made, config).to(device)
    else:
        with torch.device(device):
            net = build_net(config, named)
    return Teacher(net, config.input, config.class_names, {"architecture": config.architecture})
