"""Stage 1, ``factory run synth``: guided latent synthesis with a diffusion prior, written as shards."""
