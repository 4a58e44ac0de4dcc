"""``gigatome recipes``: lists and shows the built-in recipes."""

import typer
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

app = typer.Typer(help="List and show the built-in recipes.", no_args_is_help=True)


@app.command("list")
def list_recipes() -> None:
    """List the built-in recipes: what each reproduces and whether we have measured it."""
    from gigatome.recipes.schema import finetune_names, recipe_header, recipe_names, study_names

    table = Table("recipe", "method", "paper", "reproduces", "status", box=None, pad_edge=False)
    kinds = {**dict.fromkeys(study_names(), "study"), **dict.fromkeys(finetune_names(), "fine-tuning")}
    for name in sorted([*recipe_names(), *kinds]):
        header = {"method": kinds.get(name), **recipe_header(name)}
        table.add_row(name, *(header[key] for key in ("method", "paper", "table", "status")))
    Console().print(table)


@app.command("show")
def show_recipe(recipe: str = typer.Argument(help="Name of a recipe, or path of a YAML file.")) -> None:
    """Print a recipe's YAML, ready to be saved, changed and run."""
    from gigatome.recipes.schema import recipe_text

    text = recipe_text(recipe).rstrip("\n")
    console = Console()
    shown = Syntax(text, "yaml", background_color="default") if console.is_terminal else text
    console.print(shown, soft_wrap=True, markup=False)
