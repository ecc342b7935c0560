"""The defaults that a model's generation_config.json sets for its answers, and which of its fields are ignored here.

transformers takes from this file every option that a call does not set, also for greedy answers (a repetition_penalty
changes those too). mice_jax takes the same defaults, and reports the fields that it does not implement.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mice_jax.errors import UserError
from mice_jax.inference.sampler import Sampling

FILE = "generation_config.json"
TOP_K = 50  # The default of transformers for draws, if neither the call nor the file has a top_k.
# Options of transformers that mice_jax does not implement, each with the value at which it has no effect. The value
# None also has no effect.
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
    """How a model answers by default.

    Attributes:
      stop_ids: The token ids that end an answer.
      temperature: The temperature if answers are drawn by default, else None.
      top_p: The default of top_p; None if the file has none.
      top_k: The default of top_k; None if the file has none.
      ignored_fields: `field=value` of each field that would change answers and is not implemented.
    """

    stop_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    ignored_fields: tuple[str, ...] = ()

    def sampling_defaults(self) -> tuple[float, int]:
        """Returns top_p and top_k of a draw, with the defaults of transformers if the file has none."""
        return 1.0 if self.top_p is None else self.top_p, TOP_K if self.top_k is None else self.top_k

    def sampling(
        self,
        max_new_tokens: int,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Sampling:
        """Returns how to choose tokens: by the arguments, else by the model's defaults, else greedily.

        Args:
          max_new_tokens: The longest answer, in tokens.
          temperature: 0 takes the likeliest token each time; None takes the model's default.
          top_p: The total probability of the tokens to draw from; None takes the model's default.
          top_k: The number of likeliest tokens to draw from, 0 = all; None takes the model's default.
          seed: The seed of the draws.

        Raises:
          UserError: A value is out of range.
        """
        temperature = self.temperature if temperature is None else temperature
        top_p = self.top_p if top_p is None else top_p
        top_k = self.top_k if top_k is None else top_k
        return Sampling(max_new_tokens, temperature or 0.0, 1.0 if top_p is None else top_p, top_k or 0, seed)


def read_generation_config(folder: Path, config: dict[str, Any]) -> GenerationDefaults:
    """Reads the defaults of a model's folder.

    Args:
      folder: The folder, which may have a generation_config.json.
      config: The content of its config.json, whose eos_token_id is used if there is no generation_config.json.

    Raises:
      UserError: The file is not valid; the message names the field.
    """
    fields = read_fields(folder)
    return GenerationDefaults(tuple(stop_ids_in(config))) if fields is None else defaults_in(fields, folder / FILE)


def read_fields(folder: Path) -> dict[str, Any] | None:
    """Returns the fields of a folder's generation_config.json; None if there is no such file.

    Raises:
      UserError: The file is not a JSON object.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise UserError(f"{file} is not valid JSON: {e}. Fix or remove it.") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object. Fix or remove it.")
    return fields


def fields_of_export(
    base: dict[str, Any] | None, stop_ids: Sequence[int], *, bos_id: int | None, pad_id: int | None
) -> dict[str, Any]:
    """Returns the fields of the generation_config.json of a trained model.

    Args:
      base: The fields of the model that training started from; None if it has no such file. All are kept, except those
        that say where the file comes from.
      stop_ids: The token ids that end an answer of the trained model; those of the base end it too.
      bos_id: The bos_token_id of config.json, if it has one.
      pad_id: The tokenizer's padding token, if it has one.
    """
    base = base or {}
    kept = {key: value for key, value in base.items() if key not in ("_from_model_config", "transformers_version")}
    stops = list(dict.fromkeys([*stop_ids, *stop_ids_in(base)]))
    ids = {"bos_token_id": bos_id, "pad_token_id": pad_id}
    known = {key: value for key, value in ids.items() if value is not None}
    return {"do_sample": False} | kept | {"eos_token_id": stops} | known


def defaults_in(fields: dict[str, Any], file: Path) -> GenerationDefaults:
    """Returns the defaults that a generation_config.json sets.

    Args:
      fields: Its content.
      file: Its path, for error messages.

    Raises:
      UserError: A value is not valid; the message names the field.
    """
    stops = stop_ids_in(fields)
    if not all(type(i) is int for i in stops):
        raise UserError(f"{file} has eos_token_id={fields['eos_token_id']!r}; it must be a token id or a list of them.")
    temperature, top_p, top_k = (_number(file, fields, name) for name in ("temperature", "top_p", "top_k"))
    if not fields.get("do_sample"):  # Then transformers decodes greedily, and ignores the other fields.
        temperature = None
    elif temperature is None:
        temperature = 1.0
    top_k = None if top_k is None else int(top_k)
    return GenerationDefaults(tuple(stops), temperature, top_p, top_k, ignored_fields_in(fields))


def stop_ids_in(config: dict[str, Any]) -> list[Any]:
    """Returns the eos_token_id of a config.json or a generation_config.json as a list."""
    own = config.get("eos_token_id")
    if own is None:  # the checkpoint also has a vision tower
        own = (config.get("text_config") or {}).get("eos_token_id")
    if own is None:
        return []
    return own if isinstance(own, list) else [own]


def ignored_fields_in(fields: dict[str, Any]) -> tuple[str, ...]:
    """Returns `field=value` of each field that is not implemented here and would change answers."""
    return tuple(
        f"{k}={fields[k]!r}" for k in NO_OP_VALUES if fields.get(k) is not None and fields[k] != NO_OP_VALUES[k]
    )


def _number(file: Path, fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    low, high = {"temperature": (0, 1e9), "top_p": (1e-9, 1), "top_k": (0, 2**31)}[name]
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high or (name == "top_k" and value % 1):
        kind = {"temperature": "a number from 0 up", "top_p": "above 0 and at most 1", "top_k": "a whole number"}[name]
        raise UserError(f"{file} has {name}={value!r}; it must be {kind}. Fix or remove it.")
    return value
