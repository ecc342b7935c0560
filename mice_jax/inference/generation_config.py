"""What a folder's generation_config.json says of its model's answers, and what of it is followed here.

transformers applies the file to all that it generates: what a call does not say is as the file says, greedy answers
included (a repetition_penalty changes those too). Here the same defaults hold; what is asked for besides is not done,
and told.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mice_jax.errors import UserError

FILE = "generation_config.json"
TOP_K = 50  # transformers' own where tokens are drawn and neither a call nor the file says
# What transformers can do besides, and the value at which it does nothing; None does nothing of them all.
NO_OP_VALUES: dict[str, Any] = {
    "num_beams": 1, "repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
    "max_new_tokens": None, "max_time": None, "stop_strings": None, "bad_words_ids": None, "sequence_bias": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "guidance_scale": 1, "watermarking_config": None, "penalty_alpha": 0,
    "dola_layers": None, "constraints": None, "force_words_ids": None, "token_healing": False, "min_p": 0,
    "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """How a model is to answer; None where it does not say."""

    stop_ids: tuple[int, ...] = ()
    temperature: float | None = None  # where answers are drawn
    top_p: float | None = None
    top_k: int | None = None
    ignored_fields: tuple[str, ...] = ()  # `field=value`, each that would change an answer

    def sampling_defaults(self) -> tuple[float, int]:
        """top_p and top_k of a draw, transformers' own where the folder does not say."""
        return 1.0 if self.top_p is None else self.top_p, TOP_K if self.top_k is None else self.top_k


def read_generation_config(folder: Path, config: dict[str, Any]) -> GenerationDefaults:
    """What a folder's file says, or where it has none its config.json; UserError names the field that is wrong."""
    file = folder / FILE
    if not file.exists():
        return GenerationDefaults(tuple(stop_ids_in(config)))
    try:
        said: Any = json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file} is no JSON: {e}. Mend it, or take it away.") from None
    if not isinstance(said, dict):
        raise UserError(f"{file} is no JSON object. Mend it, or take it away.")
    stops = stop_ids_in(said)
    if not all(type(i) is int for i in stops):
        raise UserError(f"{file} has eos_token_id={said['eos_token_id']!r}; it must be a token id or a list of them.")
    temperature, top_p, top_k = (_number(file, said, name) for name in ("temperature", "top_p", "top_k"))
    if not said.get("do_sample"):  # then transformers draws nothing, whatever else is there
        temperature = None
    elif temperature is None:
        temperature = 1.0
    return GenerationDefaults(
        tuple(stops), temperature, top_p, None if top_k is None else int(top_k), ignored_fields_in(said)
    )


def stop_ids_in(config: dict[str, Any]) -> list[Any]:
    """What ends a text by a config.json, or a generation_config.json."""
    own = config.get("eos_token_id")
    return own if isinstance(own, list) else [own] if own is not None else []


def ignored_fields_in(said: dict[str, Any]) -> tuple[str, ...]:
    """`field=value` of each wish that is not followed here and changes answers."""
    return tuple(f"{k}={said[k]!r}" for k in NO_OP_VALUES if said.get(k) is not None and said[k] != NO_OP_VALUES[k])


def _number(file: Path, said: dict[str, Any], name: str) -> float | None:
    value = said.get(name)
    least, most = {"temperature": (0, 1e9), "top_p": (1e-9, 1), "top_k": (0, 2**31)}[name]
    if value is None:
        return None
    if type(value) not in (int, float) or not least <= value <= most or (name == "top_k" and value % 1):
        kind = {"temperature": "a number from 0 up", "top_p": "above 0 and at most 1", "top_k": "a whole number"}[name]
        raise UserError(f"{file} has {name}={value!r}; it must be {kind}. Mend it, or take it away.")
    return value
