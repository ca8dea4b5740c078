"""Rows of the table, a module for each kind of method; `benchmarks.world.methods` says how one is added."""
