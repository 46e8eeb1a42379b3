"""Start of a training run from the weights of an earlier one."""

from pathlib import Path

from ar_model.objectives import Objective, load_objective
from data.cache import TokenCache
from data.schema import conform
from pipelines.engine.checkpoints import file_hash
from pipelines.engine.run_files import find_run, summary_of
from pipelines.engine.summaries import Pretraining


def weights_digest(run: Path) -> str:
    """Return a hash of the weights of a finished run of pretrain_ar.

    Raises:
        ValueError: if the folder is not a finished run of pretrain_ar.
    """
    return file_hash(find_run(run, "pretrain_ar", flag="--init") / "model" / "model.safetensors")


def load_initial_weights(objective: Objective, run: Path, cache: TokenCache) -> None:
    """Replace the parameters of an objective by those of a finished run of pretrain_ar.

    Raises:
        ValueError: if the run has another objective or other sizes, or its codes are of another tokenizer than those of `cache`.
    """
    trained = load_objective(run)
    if type(trained) is not type(objective):
        expected = type(objective).__name__
        raise ValueError(f"--init {run}: is a run of {type(trained).__name__}, must be one of {expected}")
    uses_codes = "codes" in (objective.input.content, objective.predicts.content)
    tokenizer = conform(summary_of(run), Pretraining, f"{run}/summary.json")["tokenizer"]
    if uses_codes and tokenizer != cache.spec["tokenizer"]:
        raise ValueError(f"--init {run}: was trained on codes of another tokenizer than that of {cache.address}")
    given, own = (dict(model.named_parameters()) for model in (trained, objective))
    for name in sorted(given.keys() | own.keys()):
        shapes = [str(tuple(model[name].shape)) if name in model else "absent" for model in (given, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"--init {run}: other settings of the objective: {name} is {shapes[0]}, expected {shapes[1]}"
            )
    for name, parameter in own.items():
        parameter.data.copy_(given[name].data)
