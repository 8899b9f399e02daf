"""Classifiers: teachers and students. How they are named, built, loaded, saved and tapped. Used by both stages."""
