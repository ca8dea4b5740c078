"""Ready pipelines: `python -m stagekit.recipes.NAME`. A recipe is one function that returns a pipeline."""
