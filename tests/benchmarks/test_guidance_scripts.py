"""The benchmarks run through, on networks small enough for that; their clocks, counts and comparisons add up."""

import importlib
import json
import re
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stages.settings import SynthSettings

WHEN = ("interval", "every", "decoder", "gradient_at", "updates_per_step")
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_published_evaluates_the_prior_twice_a_step_and_one_image_at_a_time(script, monkeypatch):
    cost = script("guidance_cost")
    chosen = cost.settings(["prior.steps=3", "guidance.decoder=full"], 4)
    models = cost.load_models(chosen)
    group, sizes, forward = cost.make_group(chosen, 0, models.teacher.class_names), [], models.prior.network.forward
    note = lambda z, *a, **k: sizes.append((len(z), torch.is_grad_enabled())) or forward(z, *a, **k)  # noqa: E731
    monkeypatch.setattr(models.prior.network, "forward", note)
    assert cost.published(models, group, chosen, 2) == 2
    assert sizes == [(1, True)] * (2 * 3 * 2)


def test_the_breakdown_names_every_stage_once_and_puts_back_what_it_watched(script):
    cost = script("guidance_cost")

    def watched():
        return torch.autograd.grad, cost.image_writer.encode_image, cost.ShardWriter.add, cost.ShardWriter.commit

    before = watched()
    shares = cost.breakdown(["prior.steps=3", "guidance.decoder=full"], 4)
    assert (
        torch.autograd.grad,
        cost.image_writer.encode_image,
        cost.ShardWriter.add,
        cost.ShardWriter.commit,
    ) == before
    assert shares.pop("CPU ms / image") > 0 and sum(shares.values()) == pytest.approx(1)
    expected = {"prior", "guidance decoder", "decoding stored images", "teacher", "scoring stored images", "backward"}
    assert shares.keys() == expected | {"encode", "write", "everything else"} and min(shares.values()) > -0.05


def test_the_gpu_benchmark_runs_on_small_networks_without_a_gpu_and_goes_on(script, tmp_path, monkeypatch, capsys):
    gpu, out = script("gpu_guidance"), tmp_path / "gpu.json"
    options = ["--tiny", "--device", "cpu", "--shapes", "dit", "--batch", "2", "--steps", "2", "--rounds", "1"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["gpu_guidance.py", *options, "--json", str(out), *more])
        gpu.main()
        return json.loads(out.read_text()), capsys.readouterr()

    rows = [gpu.BASE, "guided by a tiny decoder, 50 steps", gpu.PUBLISHED]
    measured, told = run("--compile", "off", "--rows", rows[1])
    assert "| guided by a tiny decoder, 50 steps, 2 at once | " in told.out and "| – |" in told.out
    found, told = run("--compile", "off", "--rows", *rows)
    kept, base, published = (found["rows"]["dit"][f"{row}, 2 at once"] for row in (rows[1], rows[0], rows[2]))
    assert kept == measured["rows"]["dit"][f"{rows[1]}, 2 at once"]  # passed over
    assert all(made["images_per_s"] > 0 and made["deterministic"] for made in (kept, base, published))
    assert kept["tflop_per_image"] > base["tflop_per_image"] < published["tflop_per_image"]
    assert re.search(r"\| unguided, 50 steps, 2 at once \| [\d.]+ \| 1.00 \|", told.out)
    assert found["machine"] == {"device": "cpu", "torch": torch.__version__}
    out.write_text(json.dumps(found | {"machine": {"device": "another"}}))
    with pytest.raises(SystemExit, match="use another --json"):
        run()


def test_the_gpu_benchmark_compares_two_runs_by_checksum(script, tmp_path, monkeypatch, capsys):
    gpu = script("gpu_guidance")
    full = "guided by the full VAE, 50 steps"
    monkeypatch.setattr(gpu, "REPEATED", [full])
    options = ["--tiny", "--device", "cpu", "--shapes", "dit", "--batch", "2", "--steps", "2", "--checksums"]
    monkeypatch.setattr(sys, "argv", ["gpu_guidance.py", *options])
    gpu.main()
    assert re.search(rf"^dit, {full}, 2 at once: equal \([0-9a-f]{{12}} …\)$", capsys.readouterr().out)


def test_the_gpu_benchmark_measures_what_others_are_compared_with_first(script, monkeypatch):
    gpu = script("gpu_guidance")
    args = SimpleNamespace(
        shapes=["sd15"], rows=[gpu.PUBLISHED, gpu.DEFAULTS, gpu.BASE], batch=[16, 64], compile="both", checksums=False
    )
    cases = [case.label for case in gpu.cases(args)]
    assert cases[0] == f"{gpu.BASE}, 16 at once" and len(cases) == 9  # the published algorithm once
    assert cases.index(f"{gpu.BASE}, 64 at once") < cases.index(f"{gpu.DEFAULTS}, 64 at once")
    assert cases[-1].endswith(", compiled") and not any("compiled" in label for label in cases[:5])


def test_the_gpu_benchmark_counts_published_work_as_the_counted_rows_do(script, tmp_path):
    gpu, counted = script("gpu_guidance"), script("counted_work")
    small = {"transformer": counted.DIT | gpu.SMALL["DIT"], "vae": counted.VAE | gpu.SMALL["VAE"]}
    prior = {"path": str(counted.write_prior(tmp_path / "dit", "DiTPipeline", small))}
    prior["labels"] = {name: i for i, name in enumerate(counted.TEACHER["class_names"])}
    (_, free, *_), (_, published, *_) = islice(counted.rows(prior, ""), 2)
    for row, flops in ((gpu.BASE, free), (gpu.PUBLISHED, published)):
        sampled, guidance, _ = gpu.ROWS[row]
        chosen = counted.settings(prior | sampled, guidance or {}, method="diffdfkd" if guidance else "dmkd")
        assert gpu.counted(chosen, row == gpu.PUBLISHED) == flops


def test_digits_compares_with_the_unguided_row_in_any_order_and_on_the_cpu(script, tmp_path, monkeypatch, capsys):
    digits = script("digits")
    accuracy = {"guided": 0.9, "unguided": 0.8}

    def cell(row, seed, images, *_):
        return {"row": row, "seed": seed, "images": images, "seconds": 1, "accuracy": accuracy[row], "agreement": 1}

    monkeypatch.setattr(digits, "cell", cell)
    monkeypatch.setattr(digits, "load_models", lambda settings: None)
    (tmp_path / "validation").mkdir()
    options = ["--rows", "guided", "unguided", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["digits.py", *options])
    digits.main()
    assert "| guided | 400 | 90.0 ± 0.0 | +10.0 ± 0.0 |" in capsys.readouterr().out
    recipe = digits.recipe_of("guided", 0)
    assert recipe.synth.device == recipe.distill.device == "cpu"


def test_a_cell_of_digits_is_kept_for_its_own_settings_alone(script, tmp_path, monkeypatch):
    digits = script("digits")
    scored, checked = SimpleNamespace(test=SimpleNamespace(accuracy=0.5)), SimpleNamespace(teacher_label_agreement=1)
    learned = SimpleNamespace(students={"s": scored}, teacher_check=checked)
    monkeypatch.setattr(digits, "of_images", lambda _, images, folder: folder.mkdir() or ("m.parquet", 1.0, "kept"))
    monkeypatch.setattr(digits.Manifest, "open", lambda _: SimpleNamespace(where=lambda _: range(40)))
    monkeypatch.setattr(digits, "run_distill", lambda *_, **__: learned)
    asked = ("guided", 0, 40, None, "test.parquet", tmp_path)
    made = digits.cell(*asked)
    assert digits.cell(*asked) == made
    monkeypatch.setitem(digits.ROWS, "guided", ["synth.guidance.step_size=0.3"])
    with pytest.raises(SystemExit, match=r"cell\.json was made with other settings \(.*step_size: .* -> 0.3\): use"):
        digits.cell(*asked)


def test_students_train_where_their_seconds_are_counted(script, tmp_path, monkeypatch):
    asked = []

    def run_distill(settings, *_, **__):
        asked.append(settings.device)
        raise InterruptedError

    for module, call in (
        (script("many_students"), lambda m: m.one_run(m.STUDENTS, "m", "t", tmp_path, 2)),
        (script("teacher_cache"), lambda m: m.seconds("m", "t", tmp_path, 1, 1, True)),
    ):
        monkeypatch.setattr(module, "run_distill", run_distill)
        with pytest.raises(InterruptedError):
            call(module)
    assert asked == ["cpu", "cpu"]


def test_the_sweep_holds_the_defaults_and_every_row_of_it_is_a_recipe(script, tmp_path, monkeypatch, capsys):
    sweep = script("guidance_sweep")
    monkeypatch.setattr(sweep.digits, "ROWS", sweep.digits.ROWS | sweep.ROWS)
    recipes = {row: sweep.recipe_of(row, 0).synth for row in sweep.ROWS}
    default, chosen = SynthSettings(), recipes[sweep.DEFAULT]
    for section, name in [("prior", "scheduler"), ("prior", "steps"), *(("guidance", n) for n in WHEN)]:
        assert getattr(getattr(chosen, section), name) == getattr(getattr(default, section), name)
    made = {
        sweep.EXACT: [{"seed": s, "accuracy": 0.9, "agreement": 1.0, "seconds": 20.0} for s in (0, 1)],
        sweep.DEFAULT: [{"seed": s, "accuracy": 0.95 + s / 50, "agreement": 1.0, "seconds": 10.0} for s in (0, 1)],
    }
    sweep.table(made, 200)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"| {sweep.DEFAULT} | 2 | 96.0 ±") and "| +6.0 ±" in last
