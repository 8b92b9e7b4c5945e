"""Benchmarks: a file each, with ``main(argv)``, run by ``scripts/benchmark.py NAME``.

They share ``record.py`` (machine, results, processes of their own), ``judged.py`` (a figure beside
what is asked) and ``rounds.py`` (turns of things that are compared). ``results/`` has the rows that
README, docs and CHANGELOG cite, ``peers/`` what runs other libraries in a Python of theirs. Tests
of speed do not belong here, nor anything that a user of the package imports.
"""

import atomeq  # noqa: F401 - before torch: threads sleep while they wait, as they do for users
