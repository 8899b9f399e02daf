"""Stage 2: students learn from a manifest's images and the teacher's answers. Used by ``factory run distill``."""
