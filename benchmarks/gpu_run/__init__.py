"""One program for a machine with a GPU and little time: `python3 benchmarks/gpu_run run`.

`parent` runs `stages`, each in processes of their own (`worker`), and needs no torch. Whatever is
found is a row of `results.jsonl` at once (`journal`), from which `table` makes the tuned table and
`report` the page.
"""
