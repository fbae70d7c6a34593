"""`vugen config`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vugen_cli.commands.options import Answer, SetOption

if TYPE_CHECKING:
    from vugen_cli.recipe import ResolvedRecipe


def config(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file or the name of a shipped recipe. [default: nano]")
    ] = None,
    set_: SetOption = None,
) -> Answer:
    """Show a recipe with every value, and where each comes from: the recipe, a --set, or a default.

    What is printed is a recipe itself.

    \b
    Examples:
      vugen config imagenet-256
      vugen config --set train_sampler.lr=1e-4 --set decoder.preset=B > mine.yaml
    """
    from vugen_cli.recipe import resolve_recipe

    resolved = resolve_recipe(recipe, set_)
    typer.echo("\n".join(as_yaml(resolved)))
    return resolved


def as_yaml(resolved: "ResolvedRecipe") -> list[str]:
    """A line a value, with its origin as a comment where that is not the default."""
    import yaml

    def line(name: str, value: Any, key: str, indent: str) -> str:
        text = yaml.safe_dump({name: value}, default_flow_style=True, width=10**6, allow_unicode=True)
        text = indent + text.strip()[1:-1]
        origin = resolved.origins[key]
        return text if origin == "default" else f"{text:44}  # {origin}"

    def section(values: dict[str, Any], prefix: str, indent: str) -> list[str]:
        lines = []
        for name, value in values.items():
            if isinstance(value, dict) and value:
                lines += [f"{indent}{name}:", *section(value, f"{prefix}{name}.", f"{indent}  ")]
            else:
                lines.append(line(name, value, f"{prefix}{name}", indent))
        return lines

    return section(resolved.recipe, "", "")
