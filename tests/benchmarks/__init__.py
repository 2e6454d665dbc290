"""How fast this is: ours beside plain reference loops, in the same run and in turn. `lottery bench` runs it.

measure.py    clocks, ceilings, floors, peak memory
plain.py      the references: what public code does, and the same with the data in tensors
workloads.py  one function a benchmark
sparse.py     what the zeros of a pruned network are worth: inference by density, sparse products in training

It lies with the tests and not in the package, because the references are no part of what one installs; so it needs a
clone. Images are random numbers of the real sets' shapes and counts: no time here depends on what they show.
"""
