"""How work runs: command line, recipes, plans, executors, progress. Imports no torch at module level."""
