"""Average two checkpoints of one training run, tensor by tensor.

    python -m tools.demo_model.average EARLY_DIR LATE_DIR OUT_DIR [--weight 0.5]

The constant-rate checkpoint generalises better on real prose, the decayed one is more exact on generated tasks; the
mean keeps most of both.  `mtp.*` tensors come from LATE_DIR.
"""

import argparse
import shutil

from .export import from_family, load_tensors, to_family, write_shards


def average(early, late, weight):
    """(1 - weight) * early + weight * late, float32, by name; both dicts use training names."""
    return {k: v if k.startswith("mtp.") else early[k] + weight * (v - early[k]) for k, v in late.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("early")
    parser.add_argument("late")
    parser.add_argument("out")
    parser.add_argument("--weight", type=float, default=0.5, help="share of the late checkpoint")
    args = parser.parse_args()
    tensors = average(*(from_family(load_tensors(d)) for d in (args.early, args.late)), args.weight)
    write_shards(to_family(tensors), args.out)
    for name in ("config.json", "metrics.json"):
        shutil.copy(f"{args.late}/{name}", args.out)


if __name__ == "__main__":
    main()
