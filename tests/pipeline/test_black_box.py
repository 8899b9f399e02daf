"""A teacher that only answers, end to end: unguided samples, its selection, and a student of its answers."""

import pytest
import yaml

from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from pipeline.distill import resolve_distill, run_distill, teacher_for
from pipeline.recipe import resolve
from pipeline.synth import run_synth
from tests.pipeline.conftest import INLINE
from tests.synth.tiny import save_stable_diffusion

TEACHER = {
    "name": "tests.models.nets:opinions",
    "num_classes": 5,
    "input": {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3},
}


def recipe_file(tmp_path, **synth):
    prior = {"path": str(save_stable_diffusion(tmp_path / "prior")), "steps": 2, "cfg_scale": 1.0}
    sizes = {"shards": 2, "groups_per_shard": 1, "group_size": 20, "device": "cpu"}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"synth": {"prior": prior, "teacher": TEACHER, **sizes, **synth}}))
    return str(file)


def test_a_black_box_selects_what_its_student_learns_from(tmp_path):
    recipe = resolve(recipe_file(tmp_path, method="dmkd", min_confidence=0.2), environ={})
    made = run_synth(recipe, str(tmp_path / "data"), INLINE, quiet=True)
    assert made.rows == 40 and 0 < made.kept < 40
    rows = Manifest.open(made.manifest).where(include_rejected=True)
    rejected = [reason for reason in rows.column("reject_reason") if reason]
    assert len(rejected) == 40 - made.kept and all("teacher gives its class" in reason for reason in rejected)
    assert not (tmp_path / "data" / "teacher").exists()  # only ever named

    few = ["epochs=1", "min_agreement=0", "students=[digits-cnn-small]"]
    learning = resolve("demo", section="distill", sets=few, environ={})
    source = [(made.manifest, 1.0)]
    with pytest.raises(DataError, match="--teacher"):
        run_distill(learning, source, str(tmp_path / "student"), quiet=True)
    assert teacher_for(Manifest.open(made.manifest), learning) is None  # the demo's is not meant
    manifest, file = Manifest.open(made.manifest), str(tmp_path / "mine.yaml")
    named = teacher_for(manifest, resolve_distill(manifest, file, few, {}))  # of the file that stage 1 was given
    assert named is not None and named.name == TEACHER["name"]
    learnt = run_distill(learning, source, str(tmp_path / "student"), teacher=named, quiet=True)
    assert learnt.teacher_check.recorded_agreement == 1.0
    assert (tmp_path / "student" / "digits-cnn-small" / "model.safetensors").exists()


def test_a_black_box_that_is_to_guide_is_refused_in_one_line(tmp_path):
    recipe = resolve(recipe_file(tmp_path, method="diffdfkd"), environ={})
    with pytest.raises(UsageError, match="cannot guide: use --method dmkd") as caught:
        run_synth(recipe, str(tmp_path / "data"), INLINE, quiet=True)
    assert "\n" not in str(caught.value)
