"""Write rows as a file of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_jsonl(path: Path, *rows: Any) -> Path:
    """Write a line for each of the rows; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
