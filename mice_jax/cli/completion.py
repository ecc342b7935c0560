"""A script that completes `mice` in bash and zsh: `eval "$(mice --completion)"`."""

from mice_jax.cli.flags import COMMANDS, Command, Values
from mice_jax.config import field_names

# bash splits words at `=`, so the current word is a flag's value alone; zsh keeps both in one word.
SCRIPT = """\
# zsh runs bash's completion functions after this line.
[ -z "$ZSH_VERSION" ] || {{ autoload -U +X compinit bashcompinit && compinit -u && bashcompinit; }}
_mice() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" candidates="" file
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    candidates="{commands}"
  elif [ "$current" = "=" ] || [ "$previous" = "=" ]; then
    return # a value: files
  else
    case "$current" in
      --config.*=*) return ;;
      --*=*) # a value in zsh, whose compgen knows no files but those of the whole word
        for file in "${{current#*=}}"*; do
          [ ! -d "$file" ] || file="$file/"
          [ ! -e "$file" ] || COMPREPLY+=("${{current%%=*}}=$file")
        done
        return ;;
      --*) case "${{COMP_WORDS[1]}}" in
{cases}
        esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$candidates" -- "$current"))
  case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
if [ -n "$ZSH_VERSION" ]; then complete -o nospace -o default -F _mice mice; else complete -o default -F _mice mice; fi
"""


def script() -> str:
    """Returns the script, for the commands, flags and config fields of this version."""
    cases = "\n".join(
        f'        {name}) candidates="{" ".join(_flags(command))}" ;;' for name, command in COMMANDS.items()
    )
    return SCRIPT.format(commands=" ".join([*COMMANDS, "--help", "--version", "--completion"]), cases=cases)


def _flags(command: Command) -> list[str]:
    """Returns the flags of a command as they are typed, those of a run's config fields among them."""
    values = Values()
    command.define_flags(values, ["mice"])
    found = []
    for name, flag in values._flags().items():
        if flag.help and not name.startswith("no"):
            found.append(f"--{name}" if flag.boolean else f"--{name}=")
    if command.reads_run_config or command.module.endswith("show_config"):
        found += [f"--config.{field}=" for field in field_names() if "[]" not in field]
    return ["--help", *sorted(found)]
