"""Experiments cell by cell: every row can be made, finished cells stay, boxes are cut as latent CutMix cuts them."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


def test_every_row_is_a_recipe_and_every_question_has_its_base_row(script):
    cells = script("cells")
    tried = set()
    for question in cells.QUESTIONS.values():
        assert question.base in question.rows
        for row in question.rows.values():
            for name in [part.name for part in row.parts] + ([row.boxes] if row.boxes else []):
                assert name == cells.REAL or name in cells.sets_of(question)
                if not {(question.domain, name), (question.domain, row.train)} <= tried:
                    cells.recipe_of(question, name, 3, row)  # settings that exclude each other are refused
                tried |= {(question.domain, name), (question.domain, row.train)}


def test_a_finished_cell_is_read_and_one_of_other_settings_refused(script, tmp_path, monkeypatch):
    cells = script("cells")
    rows = script("cells_rows")
    question = rows.Question("", {"short": rows.of(rows.REAL, 2, trajectories=40)}, domain="digits", base="short")
    monkeypatch.setitem(cells.QUESTIONS, "trial", question)
    made = cells.cell("trial", "short", 1, tmp_path)
    assert (made["images"], made["steps"], made["student"]) == (40, 2, "digits-cnn-small")
    assert made["teacher_accuracy"] > 0.9 and made["data"][0]["where"] == "trajectory < 40"
    path = tmp_path / "cells" / "trial-short-1.json"
    assert cells.cell("trial", "short", 1, tmp_path) == json.loads(path.read_text()) == json.loads(json.dumps(made))
    again = rows.Question("", {"the same": question.rows["short"]}, domain="digits", base="the same")
    monkeypatch.setitem(cells.QUESTIONS, "again", again)
    monkeypatch.setattr(cells, "run_distill", None)  # the same row under another name is not trained again
    assert cells.cell("again", "the same", 1, tmp_path)["accuracy"] == made["accuracy"]
    question.rows["short"] = rows.of(rows.REAL, 3, trajectories=40)
    with pytest.raises(SystemExit, match="trial-short-1.json was made with other settings"):
        cells.cell("trial", "short", 1, tmp_path)


def test_the_table_pairs_cells_by_seed(script, tmp_path):
    cells = script("cells")
    for name, seed, accuracy in (("unguided", 0, 0.5), ("unguided", 1, 0.7), ("guided", 1, 0.9), ("guided", 2, 0.8)):
        cell = {"question": "shift", "row": name, "seed": seed, "accuracy": accuracy}
        (tmp_path / f"{name}{seed}.json").write_text(json.dumps(cell | {"images": 400, "steps": 9, "agreement": 1}))
    lines = list(cells.table("shift", tmp_path))
    assert lines[2] == "| unguided | 2 | 400 | 9 | 60.0 (50.0, 70.0) |  | 100 |  |  |  |"
    assert lines[3] == "| guided | 2 | 400 | 9 | 85.0 (90.0, 80.0) | +20.0 | 100 |  |  |  |"
    assert len(lines) == 4


def test_boxes_are_cut_step_by_step_from_the_images_before(script):
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, 4).clone()
    box = {"y": 0, "x": 1, "h": 1, "w": 1}
    mixes = [[{"step": 4, "partner": 1} | box], [{"step": 4, "partner": 0} | box, {"step": 8, "partner": 2} | box], []]
    found = script("judge").cut(images, mixes, 2)
    assert found[0, 0].tolist() == [[0, 0, 1, 1]] * 2 + [[0] * 4] * 2  # exchanged at step 4: both from before it
    assert found[1, 0].tolist() == [[1, 1, 2, 2]] * 2 + [[1] * 4] * 2  # the later box over the earlier one
    assert (found[2] == 2).all()


def test_images_are_put_in_the_order_of_other_labels_as_far_as_classes_last(script):
    assert script("judge").in_order(np.array([1, 0, 0]), np.array([0, 1, 0, 1, 0])) == [1, 0, 2]


def test_the_best_of_a_class_are_those_that_the_teacher_is_surest_of(script):
    class Rows:
        labels = np.array([0, 0, 0, 2])

        def column(self, name):
            assert name == "confidence"
            return np.array([0.5, 0.75, 0.25, 0.5])

    class Manifest:
        def where(self, where):
            assert where == "trajectory < 9 and teacher_label == label"
            return Rows()

    found = script("cells").surest(Manifest(), "trajectory < 9", 2)
    assert found == "(label == 0 and confidence >= 0.5) or (label == 2 and confidence >= 0.5)"
