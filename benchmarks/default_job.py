"""The default `tp-mrs prune`, over several seeds: what fine-tuning gives back at half the MACs.

    python -m benchmarks.default_job --seeds 0 1 2

Each seed trains its own dense model. Seeds that are in the result already are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.tables import RESULTS, fill, provenance
from tp_mrs.files import read_json, write_json

RESULT = RESULTS / "default_job.json"
FORMAT = "tp_mrs.default_job/1"


def run(seed: int) -> dict[str, Any]:
    """One job with an empty cache; what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tp_mrs", "prune", "--seed", str(seed), "--json", "--out", f"{folder}/run"]
        start = time.perf_counter()
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, "TP_MRS_CACHE": folder}
        )
        seconds = time.perf_counter() - start
    report = json.loads(done.stdout[done.stdout.index("{") :])
    last = report["rounds"][-1]
    return {
        "seed": seed,
        "macs": last["reached"],
        "dense": report["before"],
        "pruned": last["pruned"],
        "fine-tuned": report["after"],
        "seconds": round(seconds, 1),
    }


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | MACs | dense clean / PGD-20 | pruned, not yet fine-tuned | fine-tuned |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in runs:
        stages = (each[name] for name in ("dense", "pruned", "fine-tuned"))
        cells = (f"{100 * stage['clean']:.1f} / {100 * stage['robust']['pgd-20']:.1f}" for stage in stages)
        lines.append(f"| {each['seed']} | {100 * each['macs']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    RESULT.parent.mkdir(exist_ok=True)
    runs: list[dict[str, Any]] = read_json(RESULT, FORMAT)["runs"] if RESULT.exists() else []
    for seed in arguments.seeds:
        if seed in [each["seed"] for each in runs]:
            continue
        runs.append(run(seed))
        write_json(RESULT, {"format": FORMAT, **provenance(), "runs": runs})
    fill("default_job", table(runs))


if __name__ == "__main__":
    main()
