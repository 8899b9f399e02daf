"""Write a part of the real digits as Parquet, to evaluate a student on.

Usage: ``python tools/digits_data.py --split test --out build/digits-test.parquet``
"""

import argparse
from pathlib import Path

from stages.digits import write_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("train", "validation", "test"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(write_split(args.split, args.out))


if __name__ == "__main__":
    main()
