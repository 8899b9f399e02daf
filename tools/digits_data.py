"""Write a part of the real digits as Parquet, to evaluate a student on; or make their asset again.

Usage: ``python tools/digits_data.py --split test --out build/digits-test.parquet``
"""

import argparse
from pathlib import Path

import numpy as np

from stages.digits import FILE, write_split

VALIDATION, SEED = 300, 0


def splits() -> dict[str, np.ndarray]:
    """The arrays of the asset, from scikit-learn's copy of the data."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images, labels = images.reshape(-1, 8, 8).astype(np.uint8), labels.astype(np.uint8)
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=0.5, stratify=labels, random_state=SEED
    )
    train, held, train_labels, held_labels = train_test_split(
        rest, rest_labels, test_size=VALIDATION, stratify=rest_labels, random_state=SEED
    )
    parts = {"train": (train, train_labels), "validation": (held, held_labels), "test": (test, test_labels)}
    return {
        f"{part}_{what}": array
        for part, both in parts.items()
        for what, array in zip(("images", "labels"), both, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("train", "validation", "test"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rebuild", action="store_true", help="make stages/assets/digits again (needs scikit-learn)")
    args = parser.parse_args()
    if args.rebuild:
        np.savez_compressed(FILE, **splits())
    elif args.split and args.out:
        print(write_split(args.split, args.out))
    else:
        parser.error("say --split and --out, or --rebuild")


if __name__ == "__main__":
    main()
