"""`python -m kvzip.cli`: the `kvzip` command where its script is not on the path."""

from .main import main

main(prog_name="kvzip")
