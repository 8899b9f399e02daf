"""Diffusion priors, what stage 1 samples: a file for each kind; ``families`` finds and loads what fits a folder."""
