"""Turn the report of `calora demo --full --json FILE` into the packaged results that the default demo fills its tables from.

    python package_results.py FILE ../../calora_ext/demo/assets/full.json

Kept: plan, machine, rows, verdicts. Dropped: what belongs to the moment (timings, tokens per second) or is large (curves, samples).
"""

import json
import sys
from pathlib import Path


def main(report: Path, packaged: Path) -> None:
    full = json.loads(report.read_text(encoding="utf-8"))
    kept = {name: full[name] for name in ("plan", "machine", "sizes", "activations", "verdicts")}
    kept["rows"] = [{**row, "tokens_per_second": None} for row in full["rows"]]
    packaged.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
