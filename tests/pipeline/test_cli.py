"""The command line as a user meets it: help without torch, exit codes, one-line errors, JSON on stdout."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from manifests.checked_json import dump_checked, load_checked
from manifests.errors import DataError, FactoryError, Interrupted
from manifests.storage import Storage
from pipeline import cli, synth
from pipeline.lease import Lease
from tests.pipeline.fake_worker import FACTORY

COMMANDS = (
    "",
    "run",
    "run synth",
    "run distill",
    "run all",
    "run rounds",
    "demo",
    "init",
    "doctor",
    "predict",
    "prompts",
    "status",
    "inspect",
    "report",
    "compare",
    "verify",
    "eval",
    "export",
    "export data",
    "export student",
    "import",
    "rescore",
    "gc",
    "rebuild",
)
NOISE = ("--method", "noise", "--set", "groups_per_shard=2", "--set", "group_size=10", "--set", "images.size=8")


@pytest.fixture
def factory(monkeypatch, capsys):
    """``factory ARGS`` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(synth.run_synth, "__kwdefaults__", synth.run_synth.__kwdefaults__ | {"worker": FACTORY})
    monkeypatch.delenv(cli.DEBUG, raising=False)

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["factory", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return int(ended.value.code or 0), out.out, out.err

    return call


def test_help_of_every_command_imports_no_torch():
    code = f"""
import sys
from pipeline import cli
for command in {COMMANDS!r}:
    sys.argv = ["factory", *command.split(), "--help"]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, command
heavy = sorted({{"torch", "ray", "diffusers", "transformers", "pyarrow", "numpy", "PIL"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout and "--dry-run" in done.stdout


def test_version(factory, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", {"dfkd-factory": "1.2.3"}.get)
    assert factory("--version") == (0, "1.2.3\n", "")


def test_a_dry_run_imports_no_torch(tmp_path):
    code = f"""
import sys
from pipeline import cli
sys.argv = ["factory", "run", "synth", "--dry-run", "--out", {str(tmp_path / "run")!r}, *{NOISE!r}]
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fingerprint" in done.stdout
    assert not (tmp_path / "run").exists()


def test_synth_then_everything_that_looks_at_it(factory, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    code, out, err = factory("run", "synth", "--out", run, "--shards", 2, *NOISE, "--json")
    assert code == 0, err
    assert json.loads(out)["kept"] == 32
    assert "2/2" in err
    code, out, _ = factory("status", run, "--json")
    assert (code, json.loads(out)["state"]) == (0, "complete")
    code, out, _ = factory("verify", run)
    assert (code, out) == (0, f"{run}: intact\n")
    code, out, _ = factory("inspect", run / "m.parquet")
    assert code == 0 and "40 rows, 32 kept" in out
    sheet = out.splitlines()[-1].removeprefix("contact sheet: ")
    assert Image.open(sheet).height == 8 * 50 + 2  # the eight classes with kept images
    code, out, _ = factory("gc", run)
    assert code == 0 and "removed 0 unreferenced" in out
    args = ("--manifest", run / "m.parquet", "--teacher", "embedded:digits")  # a load test carries none
    code, out, _ = factory("run", "distill", *args, "--dry-run", "--json", "--epochs", 3)
    assert code == 0
    assert json.loads(out)["sources"][0]["selected"] == 32
    assert json.loads(out)["images_per_epoch"] == 30  # the others are held out
    assert json.loads(out)["settings"]["epochs"] == 3


def test_inspect_writes_a_sheet_and_nothing_else_or_answers_without_it(factory, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert factory("inspect", run_folder / "m.parquet", "--sheet", tmp_path / "new" / "s.png")[0] == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.png"]
    assert factory("inspect", run_folder)[0] == 0
    (sheet,) = (tmp_path / "runs").glob("demo-*/*")
    assert sheet.name == "sheet.png"
    sheet.unlink()
    sheet.mkdir()  # as little to be written as in a folder that is read-only
    code, out, err = factory("inspect", run_folder, "--json")
    assert (code, json.loads(out)["rows"]) == (0, 40)
    assert "sheet.png: is a folder, expected a file; --sheet FILE puts it elsewhere" in err
    code, _, err = factory("inspect", run_folder, "--sheet", sheet)
    assert (code, len(err.splitlines())) == (1, 1)


def test_a_damaged_tar_is_named_and_exits_3(factory, run_folder):
    tar = sorted((run_folder / "shards").glob("000001-*.tar"))[0]
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    code, out, _ = factory("verify", run_folder)
    assert code == 3 and "000001" in out
    tar.unlink()
    code, _, err = factory("inspect", run_folder / "m.parquet")
    assert code == 3 and tar.name in err and len(err.splitlines()) == 1


def test_a_lost_index_is_rebuilt_byte_for_byte(factory, run_folder):
    lost = [run_folder / "m.parquet", *(run_folder / "done").iterdir(), *(run_folder / "shards").glob("*.parquet")]
    before = {path: path.read_bytes() for path in lost}
    for path in lost:
        path.unlink()
    code, out, err = factory("rebuild", run_folder)
    assert code == 0, err
    assert "40 rows of 2 shards" in out
    assert before == {path: path.read_bytes() for path in lost}


def test_rebuilding_looks_for_no_prior_and_no_teacher(factory, run_folder, monkeypatch):
    (run_folder / "m.parquet").unlink()
    plan = load_checked((run_folder / "plan.json").read_bytes())
    plan["recipe"]["synth"]["prior"]["path"] = "evil/prior"  # hub ids that a downloaded plan names
    plan["recipe"]["synth"]["teacher"]["name"] = "hf:evil/teacher"
    (run_folder / "plan.json").write_bytes(dump_checked(plan))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    code, out, err = factory("rebuild", run_folder)
    assert code == 0 and "40 rows of 2 shards" in out, err
    for command in (("status",), ("verify",), ("gc",)):
        assert factory(*command, run_folder)[0] == 0


def test_rebuilding_without_a_whole_tar_says_what_to_make_again(factory, run_folder):
    tar = sorted((run_folder / "shards").glob("000001-*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:1024])
    code, out, _ = factory("rebuild", run_folder, "--json")
    assert code == 3
    assert list(json.loads(out)["damaged"]) == ["1"]
    code, _, err = factory("run", "synth", "--out", run_folder, "--shards", 2, *NOISE)
    assert code == 0, err
    assert factory("verify", run_folder)[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (["run", "synth", "-c", "nonsense"], 2, "no recipe 'nonsense'"),
        (["run", "synth", "--set", "guidance.step_sice=1"], 2, "did you mean step_size?"),
        (["run", "synth", "--set", "seed=x"], 2, "--set seed=x: synth.seed"),
        (["run", "synth", "--shards", "0"], 2, "--shards: synth.shards: input should be greater than 0, got 0"),
        (["run", "synth", "--workers", "0", *NOISE], 2, "--workers: workers: input should be greater than 0, got 0"),
        (["demo", "--workers", "0"], 2, "--workers: workers: input should be greater than 0, got 0"),
        (["demo", "--out", "memory://x/demo"], 2, "the demo needs a local folder"),
        (["demo", "--out", "notes.txt"], 2, "notes.txt is a file; --out names a folder"),
        (["run", "rounds", "--out", "notes.txt"], 2, "notes.txt is a file; --out names a folder"),
        (["run", "synth", "--out", "notes.txt/run", *NOISE], 2, "notes.txt is a file; --out names a folder"),
        (["run", "synth", "--out", "notes.txt", "--dry-run", *NOISE], 2, "notes.txt is a file; --out names a folder"),
        (["run", "synth", "--gpus-per-worker", "1", *NOISE], 2, "--gpus-per-worker: one worker in this process"),
        (["run", "synth", "--prior", "./nowhere"], 3, "no such folder"),
        (["run", "synth", "--teacher", "./nowhere", *NOISE], 3, "nowhere does not exist"),
        (["run", "distill", "-m", "missing/m.parquet"], 3, "missing/m.parquet"),
        (["run", "distill", "-m", "notes.txt"], 3, "notes.txt"),
        (["run", "distill", "-m", "x.parquet@-1"], 2, "positive number"),
        (["inspect", "notes.txt"], 3, "notes.txt"),
        (["status", "."], 3, "is not a run folder"),
        (["gc", "."], 3, "is not a run folder"),
        (["verify", "."], 3, "no dataset here"),
        (["rebuild", "."], 3, "no tars in shards/"),
    ],
)
def test_bad_input_is_one_line_with_its_exit_code_and_writes_nothing(factory, tmp_path, monkeypatch, args, code, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("not a manifest")
    found, out, err = factory(*args)
    assert found == code
    assert part in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["notes.txt"]


@pytest.mark.parametrize("command", ["run synth", "run rounds", "demo"])
def test_what_tells_to_retry_takes_the_flag(factory, tmp_path, monkeypatch, command):
    """Every command whose shards may end in quarantine can take them out."""

    def look(recipe, out, place, **_):
        raise FactoryError(f"retry {place.retry_failed}")

    monkeypatch.setattr("pipeline.synth.run_synth", look)
    monkeypatch.setattr("pipeline.demo.run_synth", look)
    monkeypatch.setattr("pipeline.rounds.run_synth", look)
    args = (*command.split(), "--out", tmp_path / "out")
    assert factory(*args)[2].splitlines()[-1] == "retry False"
    assert factory(*args, "--retry-failed")[2].splitlines()[-1] == "retry True"


def test_where_that_cannot_work(factory, run_folder):
    args = ["run", "distill", "-m", run_folder / "m.parquet", "--dry-run", "--where"]
    code, _, err = factory(*args, "color == 3")
    assert code == 2 and "color" in err and "confidence" in err
    code, _, err = factory(*args, "label == 77")
    assert code == 3 and len(err.splitlines()) == 1
    assert not (run_folder / "distill").exists()


def test_students_do_not_go_into_the_folder_of_a_run(factory, run_folder):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    code, _, err = factory("run", "distill", "-m", run_folder / "m.parquet", "-o", run_folder)
    assert (code, len(err.splitlines())) == (2, 1) and f"a run of stage 1 is there; use {run_folder}/distill" in err
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("out", ["", " ", "s3://", "a\udcff", "s3://bucket/a\udcff"])
@pytest.mark.parametrize("command", ["run synth", "run distill -m {}/m.parquet", "run rounds", "demo"])
def test_an_out_that_cannot_be_is_refused_at_once(factory, run_folder, monkeypatch, command, out):
    monkeypatch.chdir(run_folder.parent)
    before = sorted(run_folder.parent.rglob("*"))
    code, _, err = factory(*command.format(run_folder).split(), "--out", out)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert "names no file or folder" in err or "is not UTF-8" in err
    assert sorted(run_folder.parent.rglob("*")) == before


def test_another_plan_is_refused_with_a_diff(factory, run_folder):
    code, _, err = factory("run", "synth", "--out", run_folder, *NOISE, "--seed", 9, "--shards", 2)
    assert code == 3
    assert err.splitlines()[1:] == ["  settings.seed: 0 there, 9 here"]


@pytest.mark.parametrize("error", [FactoryError, DataError, Interrupted])
def test_errors_exit_with_their_code_and_cannot_steer_the_terminal(factory, monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error("bad \x1b[31mthing")

    monkeypatch.setattr("pipeline.status.status", fail)
    assert factory("status", ".") == (error.exit_code, "", "bad \\x1b[31mthing\n")


def test_debug_shows_the_traceback(factory, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["factory", "--debug", "status", str(tmp_path)])
    with pytest.raises(DataError):
        cli.main()


def test_a_second_driver_is_refused(factory, run_folder):
    with Lease(Storage(run_folder)):
        code, _, err = factory("run", "synth", "--out", run_folder, *NOISE, "--shards", 3)
    assert code == 1 and "in use by another driver" in err


def spawn(run, *args, **environment):
    command = [sys.executable, "-m", "pipeline.cli", "run", "synth", "--out", str(run), "--method", "noise", *args]
    env = os.environ | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_a_shard(run):
    until = time.monotonic() + 60
    while not list(run.glob("done/*.json")):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_killed_and_run_again_it_equals_an_unbroken_run(tmp_path):
    args = ("--shards", "6", "--set", "group_size=30")
    killed = spawn(tmp_path / "run", *args, FACTORY_FAULT="checked:3")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "run/done").iterdir())) == 3
    assert not (tmp_path / "run/m.parquet").exists()
    again, whole = spawn(tmp_path / "run", *args), spawn(tmp_path / "whole", *args)
    _, err = again.communicate()
    assert again.returncode == 0, err
    assert "taking over" in err
    assert whole.communicate() and whole.returncode == 0
    for folder in ("done", "shards"):
        names = {name: {path.name for path in (tmp_path / name / folder).iterdir()} for name in ("run", "whole")}
        assert names["run"] >= names["whole"]
    assert (tmp_path / "run/m.parquet").read_bytes() == (tmp_path / "whole/m.parquet").read_bytes()


def test_ctrl_c_drains_and_exits_130(tmp_path):
    run = tmp_path / "run"
    started = spawn(run, "--shards", "5000")
    wait_for_a_shard(run)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert "the same command resumes" in err
    assert out == ""
    assert (
        "interrupted"
        in subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "status", str(run)], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.parametrize("command", [["run", "synth", "--set", "seed=²", "--dry-run"], ["recipes"], ["status", "²"]])
def test_a_terminal_that_is_said_to_be_ascii(command, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *command],
        capture_output=True,
        env=environment,
        cwd=tmp_path,
        timeout=100,
    )
    assert done.returncode in (0, 2, 3)
    assert b"Traceback" not in done.stderr
    assert (done.stdout + done.stderr).isascii()


def test_arguments_that_are_no_text_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["factory", "status", "a\udcff"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "a\\udcff: this name is not UTF-8\n"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["synth", "--shards", "1"], "that is factory run synth"),
        (["synht"], "did you mean synth?"),
        (["stauts"], "did you mean status"),
        (["run", "distil"], "did you mean distill?"),
        (["run", "synth", "--set", "method=DMKD"], "synth.method: unknown value 'DMKD'; did you mean dmkd?"),
        (["run", "synth", "--prior", "embedded:stroke32"], "did you mean embedded:strokes32?"),
        (["run", "synth", "--teacher", "embedded:digit"], "did you mean embedded:digits?"),
        (["recipes", "foto"], "did you mean photos?"),
    ],
)
def test_the_nearest_name_is_suggested(factory, args, part):
    code, _, err = factory(*args)
    assert code == 2 and part in err and len(err.splitlines()) == 1


def test_every_command_has_a_short_help(factory):
    for command in COMMANDS:
        code, out, _ = factory(*command.split(), "-h")
        assert code == 0 and ("Example: factory" in out or command in ("", "run", "export"))
