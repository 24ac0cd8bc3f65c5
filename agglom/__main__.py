"""`python -m agglom` is `agglom`."""

from agglom.cli import run

run()
