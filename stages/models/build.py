"""Networks of any scheme without their weights: built-in, timm, torchvision, transformers and the user's own code.

Foreign networks return plain logits like the built-in ones (a hook unpacks other outputs), and
:mod:`stages.models.hooks` finds their head and stages. No code of a model repository is run.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manifests.errors import DataError, FactoryError, UsageError, one_line, suggest
from stages.memory import out_of_memory
from stages.models import nets
from stages.models.folders import fetch
from stages.models.hooks import mark, names_its_parts
from stages.models.inputs import logits_of
from stages.models.processors import quiet_transformers
from stages.models.source import IMAGENET_NETS, ModelConfig, NamedConfig, buildable_from_file, source_file, split_name


def build_net(config: ModelConfig, variant: bool = False) -> nn.Module:
    """A freshly initialized network (from torch's global random state), as ``config`` describes it; of a built-in one
    its ``variant`` (:data:`stages.models.nets.VARIANTS`).

    Raises UsageError where it cannot be built, or would need the user's own word (:class:`NamedConfig`).
    """
    require_buildable(config, "the stored config")
    if variant:
        return _builtin(config, variant)
    return _BUILDERS[split_name(config.architecture)[0]](config)


def require_buildable(config: ModelConfig, where: str) -> None:
    """Raises UsageError where the file ``where`` names an architecture that only the user may name."""
    name = config.architecture
    if not isinstance(config, NamedConfig) and not buildable_from_file(name):
        what = "is your own code" if split_name(name)[0] == "code" else "is not at hand here"
        raise UsageError(
            f"{where} names '{name}', which {what} and is never loaded because a file says so: "
            f"name it yourself, in a FILE.yaml with name: {name}, weights, input and num_classes"
        )


def adaptation_of(net: nn.Module) -> str:
    """What a small stem changed in the first layers, in words; empty if nothing."""
    return str(net.__dict__.get("adaptation", ""))


def _builtin(config: ModelConfig, variant: bool = False) -> nn.Module:
    name = config.architecture
    net = nets.build(name, config.num_classes, config.channels, config.stem, variant)
    small = config.stem == "small" and name in IMAGENET_NETS
    net.__dict__["adaptation"] = nets.SMALL_STEM[name.rstrip("v0123456789")] if small else ""
    return net


def _timm(config: ModelConfig) -> nn.Module:
    name = split_name(config.architecture)[1]
    try:
        import timm
    except ImportError:
        raise UsageError(f"'timm:{name}' needs timm: pip install 'dfkd-factory[timm]'") from None
    if not timm.is_model(name):  # also refuses timm's own hf-hub: and local-dir: names, which fetch or read files
        raise UsageError(f"timm has no model '{name}': {suggest(name.split('.')[0], timm.list_models())}")
    arguments = dict(config.arguments) if isinstance(config, NamedConfig) else {}
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        arguments.setdefault("img_size", config.input.size)
    arguments |= {"num_classes": config.num_classes, "in_chans": config.channels}
    net = _call(timm.create_model, name, pretrained=False, **arguments)
    return _with_small_stem(net, config)


TRANSFORMED = ("torchvision:googlenet", "torchvision:inception_v3")
"""Whose builders, given torchvision's own weights, map ImageNet's normalization to these weights' (transform_input)."""


def _torchvision(config: ModelConfig) -> nn.Module:
    from torchvision import models

    name = split_name(config.architecture)[1]
    if name not in models.list_models(module=models):
        raise UsageError(f"torchvision has no classifier '{name}': {suggest(name, models.list_models(module=models))}")
    arguments: dict[str, Any] = {"num_classes": config.num_classes}
    if name.startswith("vit_"):
        arguments["image_size"] = config.input.size
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": True}
    net = _call(models.get_model, name, weights=None, **arguments)
    if config.channels != 3:
        path, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
        kept = {key: getattr(first, key) for key in ("kernel_size", "stride", "padding", "dilation")}
        net.set_submodule(path, nn.Conv2d(config.channels, first.out_channels, bias=first.bias is not None, **kept))
    return _with_small_stem(net, config)


def _with_small_stem(net: nn.Module, config: ModelConfig) -> nn.Module:
    small = config.stem == "small"
    net.__dict__["adaptation"] = adapt(net, config.channels, config.input.size) if small else ""
    return finish(net, config)


def _hf(config: ModelConfig) -> nn.Module:
    return build_hf(config, fetch(split_name(config.architecture)[1], "classifier"))


def build_hf(
    config: ModelConfig, folder: Path, state: Mapping[str, Tensor] | None = None, where: str = ""
) -> nn.Module:
    """The transformers classifier in ``folder``, in float32, of the class that its config names: freshly initialized
    for ``config.input``, or around the ``state`` of the file ``where``, whose names may be those of older versions.

    Weights may have been trained at the size that the folder says, or at that of the input: both are tried.
    """
    from transformers import AutoConfig

    tried: DataError | None = None
    for resize in (True,) if state is None else (False, True):
        with quiet_transformers():
            try:
                settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, num_labels=config.num_classes)
                sizes = {"num_channels": config.channels, "image_size": config.input.size} if resize else {}
                changed = {k: v for k, v in sizes.items() if isinstance(getattr(settings, k, None), int)}
                if tried and all(getattr(settings, key) == value for key, value in changed.items()):
                    raise tried
                for key, value in changed.items():
                    setattr(settings, key, value)
                kind = hf_class(settings, folder)
                if state is None:
                    return finish(_call(kind, settings), config)
                net, report = kind.from_pretrained(
                    None, config=settings, state_dict=dict(state), dtype=torch.float32, output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )  # fmt: skip
            except FactoryError:
                raise
            except Exception as error:  # whatever transformers does with a config that it was not written for
                reason = " ".join(str(error).split())[:300]
                raise DataError(f"{folder} cannot be built by transformers: {reason}") from None
        names = {"missing": "missing_keys", "unexpected": "unexpected_keys", "shape": "mismatched_keys"}
        problems = {what: sorted(map(str, report.get(key) or ())) for what, key in names.items()}
        try:
            refuse_misfits(problems, kind.__name__, where)
            return finish(net, config)
        except DataError as error:
            tried = tried or error
    assert tried is not None
    raise tried


def hf_class(settings: Any, folder: Path) -> Any:
    """The image classifier that ``architectures`` of a transformers config names; the only one of its type without.

    Raises UsageError where the type has none, or several and the config names none of them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(settings), ())
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (found if isinstance(found, tuple) else (found,)) if kind}
    named = [name for name in settings.architectures or () if name in kinds]
    if len(kinds) == 1 or named:
        kind = kinds[named[0] if named else next(iter(kinds))]
        if kind.main_input_name == "input_ids":
            raise UsageError(f"{folder}: {kind.__name__} takes tokens, not pixels: wrap it in module.path:function")
        return kind
    if kinds:
        raise UsageError(f"{folder}: config.json must name one of {', '.join(kinds)} in architectures")
    raise UsageError(
        f"{folder}: transformers has no image classifier of type '{settings.model_type}': build the network with "
        "module.path:function"
    )


def refuse_misfits(problems: Mapping[str, list[str]], net: str, where: str) -> None:
    """Raises DataError naming the first kind of ``problems`` that the weights of ``where`` have with the class ``net``:
    four keys of it, and how many more."""
    for what, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise DataError(f"{where} does not fit {net}: {what}: {', '.join(keys[:4])}{more}")


def _onnx(config: ModelConfig) -> nn.Module:
    raise UsageError(f"'{config.architecture}' is a black box: it scores images as a teacher, and nothing else")


def _code(config: ModelConfig) -> nn.Module:
    made = call_code(config)
    if not isinstance(made, nn.Module):
        raise UsageError(f"'{config.architecture}' returns {type(made).__name__}: expected a torch.nn.Module")
    return finish(made, config)


_BUILDERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "builtin": _builtin, "timm": _timm, "torchvision": _torchvision, "hf": _hf, "onnx": _onnx, "code": _code
}  # fmt: skip


def finish(net: nn.Module, config: ModelConfig) -> nn.Module:
    """Make a foreign network return plain logits, and let :mod:`stages.models.hooks` find its head and stages."""
    what, classes = f"'{config.architecture}'", config.num_classes
    if not names_its_parts(net):
        mark(net, classes, (config.channels, config.input.size, config.input.size))
    net.register_forward_hook(lambda _module, _inputs, out: logits_of(out, classes, what))
    return net


def check_runs(net: nn.Module, config: ModelConfig) -> None:
    """Raises UsageError where ``net`` cannot take an image of its ``config``: too small a one, say."""
    size, training = config.input.size, net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, config.channels, size, size, device=next(net.parameters()).device))
    except FactoryError:
        raise
    except Exception as error:  # whatever a library's network does with a size that it was not written for
        if out_of_memory(error):
            raise
        raise UsageError(f"'{config.architecture}' cannot take {size} × {size} pixels: {one_line(error)}") from None
    finally:
        net.train(training)


def call_code(config: ModelConfig) -> Any:
    """What the user's ``module.path:function`` returns; it receives ``num_classes`` and ``channels`` if it names them.

    The current folder is searched first. Raises UsageError where it cannot be imported or called.
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
        parameters = inspect.signature(function).parameters
        arguments = {"num_classes": config.num_classes, "channels": config.channels}
        return function(**{key: value for key, value in arguments.items() if key in parameters})
    except Exception as error:  # whatever the user's function does
        raise UsageError(f"'{name}' fails: {type(error).__name__}: {_line(error)}") from error


def _call(builder: Callable[..., Any], *args: Any, **arguments: Any) -> nn.Module:
    try:
        net: nn.Module = builder(*args, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        what = args[0] if isinstance(args[0], str) else builder.__name__
        raise UsageError(f"'{what}' cannot be built with {arguments}: {_line(error)}") from error
    return net


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


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
