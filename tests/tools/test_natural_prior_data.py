"""The natural prior: photographs in one shuffled order, captions from class names, phases that fit each other."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import train_natural_prior
from natural_groups import captions
from train_natural_prior import load_pool

NAMES = ["tabby", "lion", "Chihuahua"]


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_tables_and_folders_keep_image_and_label_together(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps([{"name": name} for name in NAMES]))
    values, labels = list(range(12)), [value % 3 for value in range(12)]
    pq.write_table(pa.table({"jpg": [png(v) for v in values], "label": labels}), tmp_path / "t.parquet")
    for value, label in zip(values, labels, strict=True):
        (tmp_path / "images" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / NAMES[label] / f"{value:02d}.png").write_bytes(png(value))
    for source in ("t.parquet", "images"):
        pool = load_pool(tmp_path / source, tmp_path / "classes.json")
        assert pool.images.shape == (12, 3, 32, 32) and pool.names == NAMES
        seen = pool.images[:, 0, 0, 0].tolist()
        assert sorted(seen) == values and seen != values
        assert [value % 3 for value in seen] == pool.labels.tolist()
        last = load_pool(tmp_path / source, tmp_path / "classes.json", last=5)
        assert torch.equal(last.images, pool.images[-5:]) and torch.equal(last.labels, pool.labels[-5:])


def test_a_class_is_called_by_its_name_and_by_everyday_words():
    assert {"chihuahua", "a photo of dog", "a realistic photo of chihuahua, dog"} <= set(captions("Chihuahua"))
    assert captions("Chihuahua").count("a photo of chihuahua") == 2
    assert set(captions("torch")) == {"torch", "a photo of torch", "a realistic photo of torch"}


def test_latents_and_denoiser_belong_to_the_vae_that_decodes_them(tmp_path, monkeypatch, capsys):
    (tmp_path / "classes.json").write_text(json.dumps([{"name": name} for name in NAMES]))
    values, work = np.random.default_rng(0).permutation(24).tolist(), tmp_path / "work"
    table = {"jpg": [png(10 * v) for v in values], "label": [v % 3 for v in values]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    pq.write_table(pa.table({key: column[:20] for key, column in table.items()}), tmp_path / "b.parquet")
    monkeypatch.setattr(train_natural_prior, "HELD_OUT", 4)
    small = ["--channels", "16", "16", "--batch=2", "--vae-batch=2", "--device=cpu"]

    def train(*more, images="a"):
        where = [f"--images={tmp_path}/{images}.parquet", f"--classes={tmp_path}/classes.json", f"--work={work}"]
        monkeypatch.setattr(sys, "argv", ["train", *where, f"--out={tmp_path}/prior", *small, *more])
        train_natural_prior.main()
        return {path.stem: torch.load(path) for path in work.glob("*.pt")}

    vae_only = ("--vae-minutes=0.0001", "--denoiser-minutes=0")
    assert train(*vae_only, "--export-only") == {}
    first, other = train(*vae_only), train(*vae_only, images="b")
    assert len(first["latents"]["latents"]) == 24 and len(other["latents"]["latents"]) == 20
    assert first["latents"]["vae_step"] == first["vae"]["step"] == other["vae"]["step"]
    longer = train(f"--vae-minutes={first['vae']['seconds'] / 60 + 0.0001}", "--denoiser-minutes=0.0001")
    steps = {longer["vae"]["step"], longer["latents"]["vae_step"], longer["denoiser"]["vae_step"]}
    assert len(steps) == 1 and min(steps) > first["vae"]["step"]
    with pytest.raises(SystemExit) as refused:
        train("--vae-minutes=5", "--denoiser-minutes=0.0001")
    assert refused.value.code == 2 and "--vae-minutes 5 would train that on" in capsys.readouterr().err
    torch.save(longer["vae"] | {"step": 1000}, work / "vae.pt")
    with pytest.raises(SystemExit):
        train("--export-only")
    assert "vae.pt holds step 1000: delete denoiser.pt" in capsys.readouterr().err
