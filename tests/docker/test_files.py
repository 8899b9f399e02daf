"""Container files, checked as far as possible without an engine: sources, stages, references, commands, flags."""

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer
import yaml

from pipeline.executors.ray import actor_options
from pipeline.executors.settings import ExecutorSettings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
KUBERAY = DOCKER / "kuberay"
JOBS = {name: yaml.safe_load((KUBERAY / f"{name}.yaml").read_text()) for name in ("synth", "distill")}
CLAIMS = {claim["metadata"]["name"] for claim in yaml.safe_load_all((KUBERAY / "volumes.yaml").read_text())}


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of the Dockerfile, continued lines joined, comments dropped."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined if line)]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name → (what it is built from, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for word, rest in instructions():
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            current = []
            found[name] = (base, current)
        else:
            current.append((word, rest))
    return found


def lineage(name: str) -> list[tuple[str, str]]:
    """Instructions of a stage and of the stages it is built from."""
    base, own = stages()[name]
    return (lineage(base) if base in stages() else []) + own


def test_copied_sources_exist_and_reach_the_build():
    ignored = [
        line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    assert ignored[0] == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    sources = {
        source
        for word, rest in instructions()
        if word == "COPY" and "--from" not in rest
        for source in shlex.split(rest)[:-1]
    }
    assert sources == allowed
    for source in sources:
        assert (ROOT / source).exists(), source


def test_both_images_hold_every_package_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {
        path.parent.name for path in ROOT.glob("*/__init__.py") if any(fnmatch(path.parent.name, p) for p in patterns)
    }
    needed = packages | {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    for name in ("build-cpu", "build-cuda"):
        copied = {source for word, rest in lineage(name) if word == "COPY" for source in shlex.split(rest)[:-1]}
        assert needed <= copied
    extras = project["project"]["optional-dependencies"]
    asked = set(re.findall(r"extras=([\w,]+)|\.\[(\w+)\]", (DOCKER / "Dockerfile").read_text()))
    assert (
        {name for pair in asked for part in pair if part for name in part.split(",")}
        == {"s3", "xformers"}
        <= set(extras)
    )


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_run_as_a_user_and_keep_models_on_a_volume(target):
    steps = lineage(target)
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]
    environment = " ".join(rest for word, rest in steps if word == "ENV")
    [volume] = [rest for word, rest in steps if word == "VOLUME"]
    assert f"HF_HOME={volume}" in environment
    assert [rest for word, rest in steps if word == "COPY"] == [f"--from=build-{target} /opt/factory /opt/factory"]
    assert "--uid 1000" in next(rest for word, rest in steps if "useradd" in rest)


def test_pip_always_keeps_to_the_constraints():
    commands = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    assert len(commands) == 4
    assert all("-c constraints.txt" in command for command in commands)
    assert not any(re.search(r"(?<!-extra)-index-url", command) for command in commands)  # PyPI has the pins


def test_compose_refers_to_what_exists():
    services, targets = COMPOSE["services"], set(stages())
    assert {"store", "head", "worker", "worker-gpu"} <= services.keys()
    for name, service in services.items():
        assert not service["image"].endswith(":latest"), name
        assert ":" in service["image"], name
        assert set(service.get("depends_on", {})) <= services.keys()
        for volume in service.get("volumes", []):
            folder = re.fullmatch(r"\$\{FACTORY_FILES:-(\S+)\}:/files:ro", volume)
            assert (DOCKER / folder[1]).is_dir() if folder else volume.split(":")[0] in COMPOSE["volumes"]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing of a trial cluster is offered to the network"
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()
            assert service["build"]["target"] in targets
            assert service["image"] == f"dfkd-factory:{service['build']['target']}"
    store = services["store"]["environment"]
    assert services["head"]["environment"]["AWS_ACCESS_KEY_ID"] == store["MINIO_ROOT_USER"]
    assert services["head"]["environment"]["AWS_SECRET_ACCESS_KEY"] == store["MINIO_ROOT_PASSWORD"]


def test_ray_is_started_with_flags_it_has():
    scripts = pytest.importorskip("ray.scripts.scripts")
    known = {name for parameter in scripts.start.params for name in (*parameter.opts, *parameter.secondary_opts)}
    commands = [service["command"] for service in COMPOSE["services"].values() if service["command"].startswith("ray ")]
    flags = [word.split("=")[0] for command in commands for word in shlex.split(command) if word.startswith("--")]
    for job in JOBS.values():
        cluster = job["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
            flags += [f"--{name}" for name in group["rayStartParams"]]
    assert len(commands) == 3
    assert set(flags) <= known


def factory_commands() -> list[str]:
    """Every ``factory …`` command in these files, comments included."""
    found = [job["spec"]["entrypoint"] for job in JOBS.values()]
    text = (DOCKER / "compose.yaml").read_text()
    found += [command.replace("\\\n#", " ") for command in re.findall(r"factory (?:run|status) (?:[^\n]|\\\n)*", text)]
    return found


@pytest.mark.parametrize("command", factory_commands())
def test_factory_is_called_with_flags_it_has(command):
    from pipeline.cli import app

    words = shlex.split(command)
    parser = typer.main.get_command(app)
    for word in words[1:3] if words[1] == "run" else words[1:2]:
        parser = parser.commands[word]
    known = {name for parameter in parser.params for name in parameter.opts}
    flags = [word for word in words if word.startswith("--")]
    assert flags
    assert set(flags) <= known


def gigabytes(text: str) -> float:
    return float(text.removesuffix("Gi")) * 2**30


def test_kuberay_cluster_holds_the_workers_its_job_asks_for():
    spec = JOBS["synth"]["spec"]
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    node = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"]), "memory": gigabytes(limits["memory"])}
    words = shlex.split(spec["entrypoint"])
    workers = int(words[words.index("--workers") + 1])
    gpus = float(words[words.index("--gpus-per-worker") + 1])
    options = actor_options(ExecutorSettings(workers=workers, gpus_per_worker=gpus), [node] * group["replicas"])
    assert options["num_gpus"] == 1


@pytest.mark.parametrize("name", ["synth", "distill"])
def test_kuberay_jobs_end_and_retry(name):
    job = JOBS[name]
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    assert f"ray=={spec['rayClusterSpec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        assert set(claims) <= CLAIMS
        if claims:
            assert pod["securityContext"]["fsGroup"] == 1000
        for container in pod["containers"]:
            assert container["image"] == "dfkd-factory:cuda"
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
