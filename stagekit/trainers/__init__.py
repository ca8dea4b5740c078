"""Trainers of our own, usable without a pipeline: they take plain arguments and never see a stage."""
