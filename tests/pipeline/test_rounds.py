"""Rounds on a tiny random prior: who steers whom, what each student saw, and a second call that resumes."""

import json
from dataclasses import replace

import pytest

from manifests.errors import DataError, FactoryError, UsageError
from manifests.integrity import verify
from manifests.reader import Manifest
from pipeline.executors.settings import ExecutorSettings
from pipeline.recipe import resolve
from pipeline.rounds import SEED_STRIDE, round_result, round_settings, run_rounds
from pipeline.synth import SynthResult
from pipeline.terminal import show
from stages.distill.results import DistillResult
from stages.distill.teacher_check import TeacherCheck
from stages.models.source import teacher_identity
from stages.settings import ModelSettings
from tests.synth.tiny import save_stable_diffusion

INLINE = ExecutorSettings(retry_delay=0)
TINY = (
    "synth.prior.steps=2",
    "synth.guidance.decoder=full",
    "synth.shards=1",
    "synth.groups_per_shard=1",
    "synth.group_size=20",
    "distill.epochs=1",
    "distill.batch_size=16",
    "rounds.adversarial=0.5",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, recipe of N rounds, result of two rounds)."""
    folder = tmp_path_factory.mktemp("rounds")
    prior = save_stable_diffusion(folder / "prior", "epsilon")

    def recipe(count, *sets):
        return resolve("demo", sets=[*TINY, f"synth.prior.path={prior}", f"rounds.count={count}", *sets], environ={})

    return folder / "out", recipe, run_rounds(recipe(2), str(folder / "out"), INLINE, quiet=True)


def plan(folder, number):
    return json.loads((folder / f"round-{number:03d}/plan.json").read_bytes())


def test_the_second_round_is_steered_by_the_first_student(done):
    folder, _, result = done
    student = folder / "round-001/distill/digits-cnn-small"
    first, second = plan(folder, 1)["semantics"], plan(folder, 2)["semantics"]
    assert "adversary" not in first
    assert second["adversary"]["sha256"] == teacher_identity(ModelSettings(name=str(student)))["sha256"]
    assert second["settings"]["guidance"]["adversarial"] == 0.5
    assert [found.adversary for found in result.rounds] == [None, str(student)]
    steered = Manifest.open(folder / "round-002").where(include_rejected=True).column("loss_adv")
    plain = Manifest.open(folder / "round-001").where(include_rejected=True).column("loss_adv")
    assert not plain.any() and len(steered) == 20


def test_each_student_learns_from_all_rounds_so_far(done):
    folder, _, result = done
    for number in (1, 2):
        seen = json.loads((folder / f"round-{number:03d}/distill/run.json").read_bytes())["manifests"]
        assert [m["fingerprint"] for m in seen] == [plan(folder, n)["fingerprint"] for n in range(1, number + 1)]
    assert result.student == str(folder / "round-002/distill/digits-cnn-small")
    assert [verify(url) for url in result.manifests] == [[], []]


def test_rounds_start_from_different_noise(done):
    folder, _, _ = done
    seeds = [plan(folder, number)["recipe"]["synth"]["seed"] for number in (1, 2)]
    assert seeds == [0, SEED_STRIDE]
    first, second = (Manifest.open(folder / f"round-00{n}").where(include_rejected=True) for n in (1, 2))
    assert first.read(0) != second.read(0)


def test_again_it_keeps_what_is_there_and_finishes_what_is_not(done):
    folder, recipe, before = done
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("round-*/shards/*")}
    student = folder / "round-002/distill/digits-cnn-small/model.safetensors"
    weights = student.read_bytes()
    for path in sorted((folder / "round-002/distill").rglob("*"), reverse=True):  # as if it had not come to this
        path.rmdir() if path.is_dir() else path.unlink()
    after = run_rounds(recipe(2), str(folder), INLINE, quiet=True)
    assert after.rounds == before.rounds
    assert student.read_bytes() == weights
    assert {p: p.stat().st_mtime_ns for p in folder.glob("round-*/shards/*")} == kept
    grown = run_rounds(recipe(3), str(folder), INLINE, quiet=True)
    assert grown.rounds[:2] == before.rounds
    assert grown.rounds[2].adversary == before.student


def test_other_settings_are_refused(done):
    folder, recipe, _ = done
    with pytest.raises(DataError, match="another plan"):
        run_rounds(recipe(1, "synth.seed=5"), str(folder), INLINE, quiet=True)
    with pytest.raises(DataError, match=r"(?s)another plan.*adversarial: 0.5 there, 2.0 here"):
        run_rounds(recipe(2, "rounds.adversarial=2"), str(folder), INLINE, quiet=True)


def test_the_table(done, capsys):
    _, _, result = done
    table = list(result.lines())
    assert [line.split()[:4] for line in table[1:3]] == [["1", "20", "20", "no"], ["2", "20", "20", "yes"]]
    assert table[1].split()[5] == "–"
    show(replace(result, student="\x1b[2J"))
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_what_cannot_be_steered_is_refused_before_anything_is_written(done, tmp_path):
    _, recipe, _ = done
    for says, out, sets in (
        ("dmkd follows no adversary", tmp_path / "x", ["synth.method=dmkd"]),
        ("leave synth.adversary", tmp_path / "x", ["synth.adversary.name=a", "synth.guidance.adversarial=1"]),
        ("leaves later rounds no seeds: use at most", tmp_path / "x", ["synth.seed=9223372036854775000"]),
        ("need a local folder", "memory://x/y", []),
    ):
        with pytest.raises(UsageError, match=says):
            run_rounds(recipe(2, *sets), str(out), INLINE, quiet=True)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UsageError, match="rounds.count: .*greater than 0"):
        recipe(0)


def test_a_student_that_is_not_built_in_steers_as_well(done, tmp_path):
    pytest.importorskip("timm")
    _, recipe, _ = done
    student = "distill.students=[timm:test_resnet]"
    result = run_rounds(recipe(2, student, "synth.group_size=4"), str(tmp_path / "out"), INLINE, quiet=True)
    assert result.rounds[1].adversary == str(tmp_path / "out/round-001/distill/timm-test_resnet")


def test_a_student_of_own_code_steers_as_well(done, tmp_path):
    _, recipe, _ = done
    student = "distill.students=['tests.models.nets:tiny']"
    result = run_rounds(recipe(2, student, "synth.group_size=4"), str(tmp_path / "out"), INLINE, quiet=True)
    assert result.rounds[1].adversary == str(tmp_path / "out/round-001/distill/tests.models.nets-tiny")


def test_a_diverged_student_ends_the_rounds():
    dataset = SynthResult("run", "m.parquet", "f" * 64, 1, 20, 20, 1, 1.0)
    check = TeacherCheck(20, 0.9, 0.9, {"a": 20}, None, None, ("a", 1.0), None)
    trained = DistillResult("out", {}, check, 20, 0, 1, 1.0, 0.0, {}, {"net": "loss is NaN"})
    with pytest.raises(FactoryError, match="round 3: net was parked: loss is NaN"):
        round_result(3, dataset, trained, None, "net")


def test_no_seed_is_shared_by_runs_with_neighbouring_seeds(done):
    _, recipe, _ = done
    seeds = [round_settings(recipe(1, f"synth.seed={s}"), n, None).seed for s in range(5) for n in range(1, 6)]
    assert len(set(seeds)) == 25


def test_the_command_shows_what_it_would_do(tmp_path, capsys, monkeypatch):
    from pipeline import cli

    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["factory", "run", "rounds", "--rounds", "3", "-o", str(out), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    text = capsys.readouterr().out
    assert "rounds          3 like this one" in text and "round-001" in text
    assert not out.exists()


def test_bad_test_data_are_found_before_the_first_round(tmp_path):
    (tmp_path / "data/zero").mkdir(parents=True)
    (tmp_path / "data/zero/a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="sample 'zero/a.png' is no image"):
        run_rounds(resolve("demo", environ={}), str(tmp_path / "out"), INLINE, test_data=str(tmp_path / "data"))
    assert not (tmp_path / "out").exists()


def test_rounds_end_with_a_report_of_all_students(done, monkeypatch, capsys):
    from pipeline import cli

    folder, _, result = done
    monkeypatch.setattr("pipeline.rounds.run_rounds", lambda *_, **__: result)
    monkeypatch.setattr("sys.argv", ["factory", "run", "rounds", "--out", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and f"report: {folder}/report.html" in capsys.readouterr().err
    text = (folder / "report.html").read_text()
    assert "round-002/distill" in text and "round-001/distill" in text
    (folder / "report.html").unlink()
