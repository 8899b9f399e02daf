"""Commands of ``factory``, grouped by what they do to a dataset. Each imports what it needs when it runs."""
