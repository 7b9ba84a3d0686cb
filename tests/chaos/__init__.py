"""Chaos: a cluster of real processes in which things are broken on purpose, and what is demanded of it meanwhile.

`python -m tests.chaos` runs the fault matrix, a storm of random faults, and an undisturbed run after it; see `--help`.
Nothing in the product knows of this: the harness has entries of its own for the coordinator and the workers, which put
objects with fault points in place of the product's, and a cable between any two processes.
"""
