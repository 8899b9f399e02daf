"""Synthesis methods, one file each. Each turns a :class:`~stages.synth.groups.Group` into finished samples."""
