"""One program for a machine with a GPU and little time: `python3 benchmarks/gpu_run run`.

`parent` runs `stages`, each in processes of their own (`worker`), and needs no torch. Every result
becomes a row of `results.jsonl` at once (`journal`). From the rows `table` makes the tuned table,
and `report` the page.
"""
