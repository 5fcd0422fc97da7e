"""`fitloop bench` and `fitloop.benchmark`: what the loop costs, and whether the loader keeps up.

- `figures`, `advice`, `report`: from times to a report.
- `budget`: how many batches and rounds are measured.
- `passes`, `bare_loop`, `loader_access`, `run`: the measured passes.
- `benchmark`: the entry point.
"""
