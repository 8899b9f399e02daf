"""``factory doctor`` tries things, finds what is broken, and gives nobody away."""

import getpass
import json
import os
import socket

import pytest
import torch
from typer.testing import CliRunner

from pipeline import doctor
from pipeline.cli import app
from pipeline.recipe import resolve
from tests.synth.tiny import save_stable_diffusion


def factory(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_, **__):
        raise OSError("no route to secret.example")

    monkeypatch.setattr("urllib.request.urlopen", refused)


def test_every_check_reports_and_nothing_is_left_behind(tmp_path):
    done = factory("doctor", "-o", tmp_path / "new" / "run", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert list(states) == ["python", "torch", "gpu", "memory", "attention", "ray", "extras", "store", "hub"]
    assert (states["store"], states["hub"], states["torch"]) == ("ok", "warn", "ok")
    assert [*tmp_path.iterdir()] == []


def test_what_is_pasted_names_no_person_and_no_machine(monkeypatch):
    home, host, user = os.path.expanduser("~"), socket.gethostname(), getpass.getuser()
    assert doctor._anonymous(f"{home}/x on {host}") == "~/x on HOST"
    monkeypatch.setattr(doctor, "_memory", lambda: doctor.Check("memory", "ok", f"{home} on {host}", f"ask {user}"))
    (memory,) = [check for check in doctor.diagnose("runs").checks if check.name == "memory"]
    assert (memory.found, memory.todo) == ("~ on HOST", "ask USER")
    assert "secret.example" not in json.dumps(doctor.diagnose("runs").to_dict())


def test_a_place_that_cannot_be_written_fails_with_what_to_do(tmp_path):
    done = factory("doctor", "-o", "/proc/nothing/run")
    assert done.exit_code == 1
    line = next(line for line in done.stdout.splitlines() if "store" in line)
    assert line.startswith("fail") and "→ an --out that can be written" in done.stdout


def test_a_store_that_creates_twice_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("manifests.storage.Storage.create", lambda self, name, data: self.write(name, data) or True)
    check = doctor._store(str(tmp_path))
    assert (check.state, "created twice" in check.found) == ("fail", True)
    assert [*tmp_path.iterdir()] == []


def test_a_broken_package_is_a_line(monkeypatch):
    monkeypatch.setattr(doctor, "_ray", lambda: 1 / 0)
    (ray,) = [check for check in doctor.diagnose("runs").checks if "division" in check.found]
    assert ray.state == "fail"


def recipe(tmp_path, *sets):
    prior = save_stable_diffusion(tmp_path / "prior")
    return resolve("demo", sets=[f"synth.prior.path={prior}", "synth.prior.steps=2", *sets], environ={})


def test_the_teacher_is_shown_images_of_the_prior(tmp_path):
    check = doctor._teacher(recipe(tmp_path))
    assert "32 unguided images: mean confidence" in check.found
    gap = float(check.found.split("BatchNorm gap ")[1].split()[0])
    assert check.state == ("warn" if gap >= 1 else "ok")
    black_box = recipe(tmp_path / "other").changed(
        "synth.method=dmkd",
        "synth.teacher.name=tests.models.nets:opinions",
        "synth.teacher.num_classes=5",
        "synth.teacher.input={size: 8, mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}",
    )
    assert "a black box" in doctor._teacher(black_box).found


def test_a_large_gap_is_a_warning_that_says_what_to_do():
    assert doctor._verdict("x; ", 0.5, 0.99).state == "ok"
    check = doctor._verdict("x; ", 0.5, 1.0)
    assert check.state == "warn" and "factory eval" in check.todo


def test_a_slow_prior_is_not_run_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "MAX_FLOP", 1)
    assert "not shown any image: the prior is slow" in doctor._teacher(recipe(tmp_path)).found


def test_a_recipe_whose_teacher_is_missing_fails(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: demo\nsynth: {teacher: {name: nowhere/at/all}}\n")
    done = factory("doctor", "-c", tmp_path / "mine.yaml", "-o", tmp_path)
    assert done.exit_code == 1
    assert any(line.startswith("fail teacher") and "does not exist" in line for line in done.stdout.splitlines())
