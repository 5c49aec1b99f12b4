"""The results of `idlm bench` in the documents: copies a report, draws its plots, rewrites the table.

    python -m benchmarks.publish runs/bench-smollm2 [--name bench-smollm2]

The report goes to benchmarks/results/NAME.json, its pictures to docs/images/NAME-*.png, and in docs/benchmarks.md
everything between the lines `<!-- bench NAME -->` and `<!-- end -->` becomes its tables. Nothing there is typed.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import common
from vllm_idlm.bench import plots, report

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = {
    "throughput-latency": "Throughput against latency",
    "speedup": "Speed-up by requests at a time",
    "acceptance": "Acceptance by draft",
    "tpf-oh": "TPF against OH",
}


def insert(text: str, name: str, found: dict[str, Any]) -> str:
    """`text` with the tables of `found` between the marks of `name`; ValueError if there are none."""
    marks = re.compile(rf"(<!-- bench {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not marks.search(text):
        raise ValueError(f"docs/benchmarks.md has no '<!-- bench {name} -->' .. '<!-- end -->'; add the two lines")
    pictures = "\n".join(f"![{words}](images/{name}-{file}.png)" for file, words in PICTURES.items())
    return marks.sub(lambda match: f"{match[1]}\n{report.markdown(found)}\n\n{pictures}\n\n{match[2]}", text)


def publish(source: Path, name: str, page: Path, results: Path) -> None:
    """Everything but the command line."""
    found = report.load(source)
    page.write_text(insert(page.read_text(encoding="utf-8"), name, found), encoding="utf-8")
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    for picture in plots.draw(found, images):
        if picture.suffix == ".png":
            picture.rename(images / f"{name}-{picture.name}")
        else:
            picture.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a comparison, or its report.json")
    parser.add_argument("--name", default="bench-smollm2")
    args = parser.parse_args()
    publish(args.source, args.name, DOCS / "benchmarks.md", common.RESULTS)


if __name__ == "__main__":
    main()
