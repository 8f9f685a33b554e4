"""A standing adversary: random programs of library operations, run on the library's cache and ours.

`python -m tests.differential.long_run --steps 10000 --seed 0` is the long run; CI runs a short one.
"""
