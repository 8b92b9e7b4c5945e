"""Checks of models against recorded outputs of reference implementations: ``scripts/golden.py``.

A module here is a family of models: ``handles(case)`` says whether a case belongs to it, and
``check(case, report)`` computes the case and compares. ``registry.py`` finds the modules by
themselves, so that a new family is one file. ``cases.py`` has the two layouts in which cases lie on
disk, ``report.py`` what comes of one. No model and no test belongs here.
"""
