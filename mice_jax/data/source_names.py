"""The names of a run's sources, from its config alone."""

from pathlib import Path

from mice_jax import config


def source_names(data: config.Data) -> list[str]:
    """The names of the sources that are trained on, each once, in their order."""
    return list(dict.fromkeys(source_name(s) for phase in data.phases for s in phase.sources))


def held_out_names(data: config.Data) -> list[str]:
    """The names of the sources that are held out, each once."""
    if data.validation_fraction:
        return source_names(data)
    return list(dict.fromkeys(map(source_name, held_out_sources(data))))


def held_out_sources(data: config.Data) -> list[config.Source]:
    """The sources of files that are held out as a whole, of all phases."""
    return [*data.validation, *(source for phase in data.phases for source in phase.validation)]


def source_name(source: config.Source) -> str:
    """The name of a source in reports and metrics: its own, or that of its file or, for a glob, of its folder."""
    path = Path(source.path)
    magic = set() if path.exists() else set("*?[")
    named = [part for part in path.parts if not set(part) & magic] or [source.path]
    return source.name or named[-1].split(".")[0]
