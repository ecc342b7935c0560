"""Writes docs/config_reference.md, a table of every config field, from the docstrings in mice_jax/config.py.

python docs/make_config_reference.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs" / "config_reference.md"
# Sections of a config by the prefix of their flags; the rest is set in a file only.
PREFIXES = {
    "Config": "",
    "Model": "model.",
    "Lora": "model.lora.",
    "Data": "data.",
    "Phase": "data.phases[i].",
    "Source": "data.phases[i].sources[j].",
    "Optim": "optim.",
    "Mesh": "mesh.",
    "Train": "train.",
    "Checkpoint": "checkpoint.",
    "Log": "log.",
    "Eval": "eval.",
    "Stop": "stop.",
    "Branch": "branch.",
    "Published": "published[i].",
    "Sweep": "",
    "Range": "",
}
HEAD = """# Every config field

This page is generated from `mice_jax/config.py` by `python docs/make_config_reference.py`. [Configs](configs.md)
explains how to write and vary a config. A field is set in a config file (`c.optim.batch_size = 64`) or by a flag
(`--config.optim.batch_size=64`). `mice config --config=FILE.py` prints the values that a file and its flags give.
"""


def render(source: str) -> str:
    """The page, from the text of config.py."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    parts = [HEAD]
    for name, prefix in PREFIXES.items():
        rows = [_row(prefix, field, text) for field, text in _fields(classes[name])]
        doc = " ".join((ast.get_docstring(classes[name]) or "").split())
        parts.append(f"\n## {name}\n\n{doc}\n\n| field | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "".join(parts)


def _fields(node: ast.ClassDef) -> list[tuple[ast.AnnAssign, str]]:
    """Each field of a class with its docstring, which follows it."""
    found = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            found.append((statement, text))
    return found


def _row(prefix: str, field: ast.AnnAssign, text: str) -> str:
    assert isinstance(field.target, ast.Name)
    return f"| `{prefix}{field.target.id}` | {_default(field.value)} | {text} |"


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, ast.Call):
        return f"`{ast.unparse(value)}`"
    factory = ast.unparse(value.keywords[0].value)
    return {"list": "`[]`", "dict": "`{}`"}.get(factory, f"`{factory}()`")


if __name__ == "__main__":
    OUTPUT.write_text(render((ROOT / "mice_jax" / "config.py").read_text()))
