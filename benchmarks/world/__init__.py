"""A small computed world in which right and wrong answers are known, so that alignment can be measured."""
