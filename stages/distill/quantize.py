"""A student as INT8 ONNX, calibrated on synthetic images: static quantization by ONNX Runtime, without real data.

Weights are rounded per output channel; the range of every activation is what the calibration images make of it. What
that costs is measured on other images before the file is published.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manifests.errors import DataError, FactoryError, UsageError
from manifests.order import spread
from manifests.reader import Manifest
from stages.distill.evaluate import evaluate
from stages.distill.export import describe, export_onnx
from stages.models.inputs import InputSpec, to_unit
from stages.models.source import ModelConfig, resolve
from stages.settings import ModelSettings

CALIBRATION, HELD_OUT = 512, 2000
"""Images at most."""
BATCH = 32


@dataclass(frozen=True)
class Quantized:
    """The INT8 ``file``. ``agreement``: share of ``held_out`` synthetic images to which it gives the class that the
    fp32 file gives. ``accuracy``, ``fp32_accuracy``: on the test data, if given. Latencies: one image, one thread,
    median, ms."""

    student: str
    file: str
    bytes: int
    fp32_bytes: int
    calibration: int
    held_out: int
    agreement: float
    accuracy: float | None
    fp32_accuracy: float | None
    test_agreement: float | None
    latency_ms: float
    fp32_latency_ms: float

    def line(self) -> str:
        """For the card."""
        tested = ""
        if self.accuracy is not None and self.fp32_accuracy is not None and self.test_agreement is not None:
            tested = f"; test data: {self.fp32_accuracy:.1%} → {self.accuracy:.1%} ({self.test_agreement:.1%} agree)"
        return (
            f"INT8: {self.fp32_bytes / 1e3:.0f} → {self.bytes / 1e3:.0f} kB, {self.fp32_latency_ms:.2f} → "
            f"{self.latency_ms:.2f} ms per image (ONNX Runtime, one thread); the class of fp32 for "
            f"{self.agreement:.1%} of {self.held_out} held-out synthetic images, calibrated on {self.calibration} "
            f"others{tested}"
        )


def export_int8(
    student: str, file: str, manifest: Manifest, max_loss: float = 0.02, test_data: Sequence[str] = ()
) -> Quantized:
    """Write ``file`` (.onnx): ``student`` in INT8, calibrated on half of the images that ``manifest`` selects (at most
    ``CALIBRATION``), compared with fp32 on others and on ``test_data``; input and output as of :func:`export_onnx`.

    Raises FactoryError, and writes nothing, where more than the share ``max_loss`` of the held-out images gets another
    class, or the accuracy on the test data falls by more; DataError where the dataset has other classes or too few
    images, UsageError where the extra is not installed.
    """
    try:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise UsageError(f"--int8 needs {error.name}: pip install 'dfkd-factory[onnx]'") from None
    if not 0 <= max_loss <= 1:
        raise UsageError(f"--max-loss {max_loss:g}: expected a share, 0 to 1")
    target, config = Path(file), resolve(ModelSettings(name=student)).config
    if manifest.info.class_names != config.class_names:
        raise DataError(f"{manifest.url} was made for other classes than those of {student}: calibrate with its own")
    if len(manifest) < 2 * BATCH:
        raise DataError(f"{manifest.url}: {len(manifest)} images are selected; calibration needs {2 * BATCH}")
    chosen = spread(np.arange(len(manifest)), 2 * CALIBRATION)
    calibration, free = chosen[::2], np.setdiff1d(np.arange(len(manifest)), chosen[::2])
    held_out = spread(free, HELD_OUT)
    if not target.parent.is_dir():
        raise UsageError(f"{file}: folder {target.parent} does not exist")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        fp32, int8 = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        export_onnx(student, str(fp32))
        quantize_static(
            fp32, int8, _Batches(manifest, calibration, config), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )  # fmt: skip
        before, after = (_classes(path, _Batches(manifest, held_out, config)) for path in (fp32, int8))
        describe(int8, config)
        tested = evaluate(str(int8), [*test_data], ModelSettings(name=str(fp32))) if test_data else None
        made = Quantized(
            student=student,
            file=file,
            bytes=int8.stat().st_size,
            fp32_bytes=fp32.stat().st_size,
            calibration=len(calibration),
            held_out=len(held_out),
            agreement=float(np.mean(before == after)),
            accuracy=tested.accuracy if tested else None,
            fp32_accuracy=tested.teacher_accuracy if tested else None,
            test_agreement=tested.model_teacher_agreement if tested else None,
            latency_ms=_latency(int8, config),
            fp32_latency_ms=_latency(fp32, config),
        )
        _check(made, max_loss)
        measured = {name: str(value) for name, value in asdict(made).items() if name not in ("student", "file")}
        describe(int8, config, **{f"int8_{name}": value for name, value in measured.items()})
        int8.replace(target)
    _note_in_card(Path(student), made)
    return made


def _check(made: Quantized, max_loss: float) -> None:
    lost = {f"of {made.held_out} held-out synthetic images {{:.1%}} get another class": 1 - made.agreement}
    if made.accuracy is not None and made.fp32_accuracy is not None:
        lost["the accuracy on the test data falls by {:.1%}"] = made.fp32_accuracy - made.accuracy
    for what, loss in lost.items():
        if loss > max_loss:
            raise FactoryError(
                f"INT8 loses too much: {what.format(loss)}, at most {max_loss:.1%} were allowed (--max-loss): "
                f"not written; more or other images to calibrate with may help"
            )


class _Batches:
    """Images as the exported file takes them, ``[n, channels, size, size]`` in [0, 1], batch by batch: a
    ``CalibrationDataReader`` by duck type."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, config: ModelConfig) -> None:
        channels = config.input.channels
        rule = {"mean": (0.0,) * channels, "std": (1.0,) * channels, "channel_order": "rgb"}
        self.spec = InputSpec(config.input.model_copy(update=rule))
        self.manifest, self.rows, self.at = manifest, rows, 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = self.rows[self.at : self.at + BATCH]
        self.at += BATCH
        if not len(part):
            return None
        pixels = torch.from_numpy(np.stack(self.manifest.pixels(part)))
        return {"images": self.spec(to_unit(pixels)).numpy()}


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def _classes(path: Path, batches: _Batches) -> np.ndarray:
    session, found = _session(path), []
    while batch := batches.get_next():
        found.append(session.run(None, batch)[0].argmax(1))
    return np.concatenate(found)


def _latency(path: Path, config: ModelConfig) -> float:
    session, times = _session(path), []
    image = np.zeros((1, config.channels, config.input.size, config.input.size), np.float32)
    for _ in range(30):
        started = time.perf_counter()
        session.run(None, {"images": image})
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def _note_in_card(folder: Path, made: Quantized) -> None:
    """Say it in the card of a student's folder, in place of what an earlier export said."""
    card = folder / "README.md"
    if not card.is_file():
        return
    lines = [line for line in card.read_text().splitlines() if not line.startswith("- **INT8**")]
    part = card.with_name(".README.md.part")
    part.write_text(
        "\n".join([*lines, f"- **INT8** ({Path(made.file).name}): {made.line().removeprefix('INT8: ')}"]) + "\n"
    )
    part.replace(card)
