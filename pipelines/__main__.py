"""`python -m diffattn.pipelines` is the `diffattn` command."""

from .cli import main

main()
