"""Who judges in a stage, and under which journal: what the types with a judge do with a job."""

from typing import Any

from stagekit.choices import Chooser, FunctionChooser, ScriptedChooser, ServerChooser
from stagekit.errors import StageError
from stagekit.generating import generator_for, open_journal
from stagekit.groups import Generation, is_function, is_server
from stagekit.job import Job
from stagekit.requests import Generator, ScriptedGenerator


def judge_generator(job: Job, judge: Any, generation: Generation, policy: Generator | None) -> Generator | None:
    """What writes in the judge's name: the policy where `judge` is None, else the model, the stage's result or the
    server that it names; None for a function, which writes nothing.

    Args:
        policy: the generator of the answers, where it is loaded and is the judge too.
    """
    if is_function(judge):
        return None
    if is_server(judge):
        return generator_for(job, None, generation.model_copy(update={"backend": judge}))
    if policy is not None:
        return policy
    plain = generation.model_copy(update={"backend": "transformers"})
    if judge is not None:
        return generator_for(job, _named(job, str(judge)), plain)
    return generator_for(
        job, job.model.generates if job.model else None, plain if is_engine(generation) else generation
    )


def is_engine(generation: Generation) -> bool:
    """Whether what writes can do nothing else, so that its model is loaded by transformers to judge."""
    return bool(generation.backend == "vllm")


def chooser_of(judge: Any, generator: Generator | None) -> Chooser:
    """The judge as something that makes choices.

    Args:
        judge: as the stage names it.
        generator: what writes in its name.
    """
    if is_function(judge):
        from stagekit.custom import resolve

        return FunctionChooser(resolve(judge))
    if isinstance(generator, ScriptedGenerator):
        return ScriptedChooser(generator)
    from stagekit.backends import ServerGenerator

    if isinstance(generator, ServerGenerator):
        return ServerChooser(generator)
    from stagekit.choosing import ModelChooser
    from stagekit.generation import TransformersGenerator

    assert isinstance(generator, TransformersGenerator)
    return ModelChooser(generator)


def open_judgements(job: Job, digest: str, judge: Any, name: str) -> Any:
    """The journal of what a judge says; one of other settings is moved aside."""
    return open_journal(job, digest, {"judge": judge.fingerprint}, name)


def _named(job: Job, judge: str) -> str:
    """The folder of a model that a stage names as its judge.

    Raises:
        StageError: that stage left none.
    """
    if judge.startswith("stage:"):
        policy = job.results[judge.removeprefix("stage:")].policy
        if policy is None:
            raise StageError(f"stage {job.stage.name!r}: method.judge: {judge!r} left no model")
        return policy
    from stagekit.models import local_model

    return local_model(judge, where=f"{job.stage.path}.method.judge")
