"""Makes the model card of an exported model, its README.md: what the weights started from and how they were trained.

A card is published with the model, so it names files and folders by their last component only, never by a path of the
machine that trained.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

README = "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")
# Metrics of a step that describe the model; the others describe the step, such as its time and gradient norm.
STEP_METRICS = ("loss", "token_accuracy", "entropy")
# A named data set, which is shown whole: `hf:owner/name:split`, `tfds:name/config:split`.
NAMED_DATA = re.compile(r"(hf|tfds):[\w.-]+(/[\w.-]+)?(:[\w.+%\[\]:-]*)*")
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)

Json = Mapping[str, Any]


# ---------------------------------------------------------------------------------------- the licence of the base
def licence_of(folder: Path) -> dict[str, str]:
    """Returns the licence fields in the front matter of a folder's README.md; empty if it names no licence.

    Args:
      folder: A Hugging Face folder, or the `model` folder of a run, which keeps the README.md of its base.
    """
    file = folder / README
    return licence_in(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else {}


def licence_in(text: str) -> dict[str, str]:
    """Returns the licence fields in the YAML front matter of a model card; empty if it names no licence."""
    found = FRONT_MATTER.match(text)
    try:
        fields = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    if not isinstance(fields, dict) or not isinstance(fields.get("license"), str):
        return {}
    return {name: fields[name] for name in LICENCE_FIELDS if isinstance(fields.get(name), str)}


# ---------------------------------------------------------------------------------------- the card
def model_card(
    title: str,
    config: Json,
    report: Json,
    summary: Json,
    metrics: Json,
    *,
    step: int,
    dtype: str,
    licence: Mapping[str, str],
    average: str = "",
) -> str:
    """Returns the text of a model card.

    Args:
      title: The name of the model.
      config: The content of the run's config.json.
      report: The content of its data_report.json; empty if there is none.
      summary: The content of its summary.json; empty if the run was killed before it wrote one.
      metrics: The record of the exported step; empty if there is none.
      step: The step whose weights are exported.
      dtype: The dtype of the exported weights.
      licence: The licence fields of the base model, from `licence_of`.
      average: What the exported weights are an average of; "" if they are those of the step.
    """
    sections = {
        "Base model": _base(config, licence),
        "Data": _data(report),
        "Recipe": _recipe(config, report, step, dtype, average),
        "Metrics": _metrics(metrics, step),
        "Versions": _versions(summary),
    }
    body = "".join(f"\n## {name}\n\n{text}\n" for name, text in sections.items())
    return f"{_front_matter(config, licence)}\n# {title}\n{body}"


def _front_matter(config: Json, licence: Mapping[str, str]) -> str:
    hosted = _hosted(config)  # The Hub links `base_model` to a repository, so that no folder may be named there.
    fields = {"base_model": hosted["repo"]} if hosted else {}
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation", **licence}
    # A JSON string is a YAML string too.
    return "---\n" + "".join(f"{k}: {json.dumps(v, ensure_ascii=False)}\n" for k, v in fields.items()) + "---\n"


def _hosted(config: Json) -> Json:
    """Returns the repository and commit of the Hub that the weights started from; empty for another start."""
    return (_field(config, "resolved.hub") or {}).get("model.init_from", {})  # The key has a dot in it.


def _split_step(init_from: str) -> tuple[str, str]:
    """Returns the name of a folder, and the step if the folder is a checkpoint of a run; else ""."""
    path = PurePosixPath(init_from)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent.name, path.name
    return path.name, ""


def _base(config: Json, licence: Mapping[str, str]) -> str:
    init_from = str(_field(config, "model.init_from") or "")
    if init_from.startswith("random:"):
        shape = PurePosixPath(init_from.removeprefix("random:"))
        shape = shape.parent if shape.name == "config.json" else shape
        return f"None: all weights were drawn at random, for the architecture in `{shape.name}`."
    name, step = _split_step(init_from)
    after = f", after its step {int(step):,}" if step else ""
    if hosted := _hosted(config):
        name, after = hosted["repo"], f", at commit `{hosted['commit']}`"
    stated = f"Its licence: {', '.join(licence.values())}." if licence else (
        "Its licence is not known, because its folder had no README.md that names one; it is left out here."
    )  # fmt: skip
    return f"`{name}`{after}. {stated}"


def _data(report: Json) -> str:
    if not report:
        return "The run has no data_report.json."
    rows = [
        (name, _public(s["path"]), f"{s['weight']:g}", *(f"{s[k]:,}" for k in ("kept", "tokens", "loss_tokens")))
        for name, s in report.get("sources", {}).items()
    ]
    text = _table(("source", "from", "weight", "samples", "tokens", "trained tokens"), rows)
    held_out = [
        (name, _public(s["path"]), *(f"{s[k]:,}" for k in ("kept", "tokens")))
        for name, s in report.get("validation", {}).items()
    ]
    if held_out:
        text += "\n\nHeld out:\n\n" + _table(("source", "from", "samples", "tokens"), held_out)
    return text


def _public(path: str) -> str:
    """Returns the name of a source without the folders of the machine that it is on."""
    return path if NAMED_DATA.fullmatch(path) else PurePosixPath(path).name


def _recipe(config: Json, report: Json, step: int, dtype: str, average: str) -> str:
    get = lambda name: _field(config, name)  # noqa: E731  (a word for what every line below does)
    warmup = f"{get('optim.warmup_steps')} steps" if get("optim.warmup_steps") else get("optim.warmup_ratio")
    planned = report.get("steps")
    rows = {
        "batch size": _unless_none(get("optim.batch_size"), "{:,} samples"),
        "peak learning rate": _unless_none(get("optim.learning_rate"), "{:g}"),
        "schedule": get("optim.schedule"),
        "warm-up": warmup or None,
        "optimizer": get("optim.name"),
        "weight decay": _unless_none(get("optim.weight_decay"), "{:g}"),
        "gradient clipping": _unless_none(get("optim.grad_clip") or None, "{:g}"),
        "loss": _unless_none(get("optim.loss_reduction"), "mean over each {}"),
        "trained on": get("data.train_on"),
        "longest sample": _unless_none(get("data.max_length"), "{:,} tokens"),
        "adapters": _adapters(get("model.lora") or {}),
        "frozen": ", ".join(get("optim.frozen") or []) or None,
        "frozen directions": _unless_none(
            get("optim.osft_rank_ratio") or None, "the leading {:.4g} of each matrix (OSFT)"
        ),
        "computed in": get("resolved.compute_dtype"),
        "seed": get("seed"),
        "steps": f"{step:,}" + (f" of {planned:,}" if planned else ""),
        "weights": dtype,
        "averaged": average or None,
    }
    text = _table(("setting", "value"), [(name, str(value)) for name, value in rows.items() if value is not None])
    return f"{text}\n\n{_phases(get('data.phases') or [])}".rstrip()


def _adapters(lora: Json) -> str | None:
    """Returns a description of the adapters that were trained; None if the model's own weights were."""
    if not lora.get("rank"):
        return None
    scale = "sqrt(rank)" if lora["rslora"] else "rank"
    on = ", ".join(lora["targets"]) or "all matrices of the layers"
    kind = "DoRA, " if lora.get("dora") else ""
    return f"{kind}rank {lora['rank']}, alpha {lora['alpha']:g} / {scale}, on {on}"


def _phases(phases: Sequence[Json]) -> str:
    rows = []
    for phase in phases:
        epochs, steps = phase.get("num_epochs", 1), phase.get("num_steps")
        length = f"{steps:,} step{'s' * (steps != 1)}" if steps else f"{epochs:g} epoch{'s' * (epochs != 1)}"
        # Of 0 stands for the value of the whole run, which the table above has.
        own = [f"{phase[k]:g}" if phase.get(k) else "as above" for k in ("batch_size", "learning_rate")]
        rows.append((str(phase.get("name", "")), length, *own))
    return _table(("phase", "length", "batch size", "peak learning rate"), rows) if rows else ""


def _metrics(metrics: Json, step: int) -> str:
    if not metrics:
        return f"None are recorded for step {step:,}."
    done = [f"{metrics[k]:,} {what}" for k, what in (("samples", "samples"), ("tokens", "tokens")) if k in metrics]
    rows = [(name, f"{v:.4g}") for name, v in metrics.items() if isinstance(v, float) and _describes_model(name)]
    rows.sort(key=lambda row: not row[0].startswith("eval/"))  # held-out metrics first, each group in its own order
    of = f" ({', '.join(done)})" if done else ""
    return (
        f"After step {step:,}{of}. `eval/` is measured on held-out samples, the loss in nats per token.\n\n"
        + _table(("metric", "value"), rows)
    )


def _describes_model(name: str) -> bool:
    return name in STEP_METRICS or ("/" in name and not name.endswith("loss_tokens"))


def _versions(summary: Json) -> str:
    if "versions" not in summary:
        return "The run has no summary.json, so they are not recorded."
    text = _table(("package", "version"), [(name, str(v)) for name, v in summary["versions"].items()])
    commit = summary.get("git_commit")
    return text + (f"\n\nTrained by mice_jax at commit `{commit}`." if commit else "")


# ---------------------------------------------------------------------------------------- parts
def _field(config: Json, name: str) -> Any:
    """Returns a field by its dotted name; None if the run was made by a version that did not have it."""
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _unless_none(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
