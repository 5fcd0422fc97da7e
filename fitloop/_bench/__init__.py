"""`fitloop bench` and `fitloop.benchmark`: the cost of the loop, and the speed of the loader.

Times the train phase of a user's trainer in several variants and advises changes. Must not know how
a fit is recorded or shown.

- `figures`: from the times of passes to figures.
- `advice`: from figures to advice.
- `report`: figures and advice as text, HTML and JSON.
- `budget`: the numbers of batches and rounds.
- `timing`: timed passes, by fitloop's engine and by a hand-written loop.
- `loader_access`: repeated reading of a user's loader.
- `run`: the order of the passes.
- `benchmark`: the public function.
"""
