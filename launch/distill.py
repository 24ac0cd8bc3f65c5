"""`agglom distill` for the DeepSpeed launcher, from a bare checkout and any folder."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the launcher puts launch/ there
from agglom.cli import run  # noqa: E402

run(["distill", *sys.argv[1:]])
