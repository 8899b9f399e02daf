"""The digits that come with the package are those of scikit-learn, in the same parts and order."""

import numpy as np
import pytest

from stages.digits import FILE, load_split
from tools.digits_data import splits


def test_parts_and_labels():
    for part, count in (("train", 598), ("validation", 300), ("test", 899)):
        images, labels = load_split(part)
        assert images.shape == (count, 8, 8) and images.dtype == np.uint8 and images.max() == 16
        assert np.bincount(labels).min() >= count // 10 - 3 and labels.max() == 9
    assert FILE.stat().st_size < 80_000


def test_the_asset_is_what_scikit_learn_has():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    with np.load(FILE) as stored:
        made = splits()
        assert {*stored} == {*made}
        assert all(np.array_equal(stored[name], made[name]) for name in made)
