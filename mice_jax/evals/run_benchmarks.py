"""The benchmarks that a run scores while it trains (`eval.tasks`)."""

from collections.abc import Callable, Iterable
from typing import Any

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from mice_jax.config import Eval
from mice_jax.evals import benchmarks
from mice_jax.inference.generation_config import GenerationDefaults
from mice_jax.model_source import ModelSource, stop_ids
from mice_jax.models.spec import ModelSpec
from mice_jax.models.transformer import Decoder, Params
from mice_jax.storage.workdir import DIRECTIONS, Workdir

Scores = dict[str, float | None]  # Scores by the names that metrics.jsonl has.


class RunBenchmarks:
    """The benchmarks of a run. They are loaded with their documents before the weights."""

    def __init__(self, config: Eval, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec):
        """Loads the benchmarks.

        Args:
          config: The part of the run's config that names the benchmarks.
          tokenizer: The run's tokenizer.
          spec: The run's model.

        Raises:
          UserError: A benchmark cannot be loaded, or the model cannot be asked one of its tasks.
        """
        self._tokenizer = tokenizer
        self._settings = benchmarks.Settings(
            num_fewshot=None if config.num_fewshot < 0 else config.num_fewshot,
            limit=config.limit or None,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.apply_chat_template,
            system_instruction=config.system_instruction or None,
        )
        self._benchmarks = benchmarks.load_benchmarks(
            config.tasks, config.include_path, self._settings, tokenizer, GenerationDefaults(), spec.max_positions
        )

    def fingerprint(self) -> str:
        """Returns a hash of all that the scores depend on apart from the model."""
        return " ".join(benchmark.fingerprint for benchmark in self._benchmarks)

    def metric_names(self) -> list[str]:
        """Returns the names of the scores in metrics.jsonl."""
        return [f"eval/{name}" for name in self._higher_is_better()]

    def write_directions(self, workdir: Workdir) -> None:
        """Adds the direction of each score, "max" or "min", to the workdir's file of directions."""
        higher = self._higher_is_better()
        if higher:
            known = workdir.read_json(DIRECTIONS) or {}
            workdir.write_json(DIRECTIONS, known | benchmarks.directions(higher))

    def scorer(
        self, source: ModelSource, decoder: Decoder, mesh: Mesh, dtype: Any, log: Callable[[str], None]
    ) -> Callable[[Params], Iterable[Scores]]:
        """Returns a function that scores parameters, one benchmark after the other.

        Args:
          source: The model that the run starts from, whose config.json has the tokens that end an answer.
          decoder: The model.
          mesh: The mesh on which its parameters are placed.
          dtype: The dtype of activations.
          log: Called once with each warning.
        """
        # The exported model will have the same generation defaults.
        generation = GenerationDefaults(tuple(stop_ids(source.config, self._tokenizer)))
        evaluator = benchmarks.BenchmarkEvaluator(
            self._benchmarks, self._settings, decoder, mesh, dtype, self._tokenizer, generation
        )
        return lambda params: evaluator.measure(params, log)

    def _higher_is_better(self) -> dict[str, bool]:
        return {name: higher for benchmark in self._benchmarks for name, higher in benchmark.metrics().items()}
