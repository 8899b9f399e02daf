"""How work runs: command line, recipes, plans, executors, progress. Imports no torch at module level.

Public names are those of :mod:`dfkd_factory`: ``Recipe``, ``run_synth``, ``run_distill``, ``run_rounds`` and others.
"""
