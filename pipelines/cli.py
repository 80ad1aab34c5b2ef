"""`assay`: the command line. The commands are in `commands/`, by noun; here they get their names.

Exit codes: 0 done (or promoted, or submitted), 1 held, 3 inconclusive, 2 the input's fault, 130 interrupted or
cancelled, 70 a step broke.
"""

import os
import sys

import typer

from assay.components.contracts.errors import AssayError

from .commands import advise, approval, engines, models, recipes, runs, trigger
from .commands.options import RECIPES as RECIPES
from .images import commands as images

app = typer.Typer(
    help="Post-training as a pipeline: a model is promoted only on evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(runs.run)
app.command()(runs.resume)
app.command()(runs.runs)
app.command()(runs.report)
app.command("advise")(advise.advise_)
app.command("compile")(engines.compile_)
app.command()(engines.lint)
app.command()(engines.schedule)
app.command()(models.serve)
app.command()(models.champion)
app.command()(models.history)
app.command()(models.verify)
app.command()(approval.queue)
app.command()(approval.review)
app.command()(approval.approve)
app.command()(approval.reject)
app.command()(models.rollback)
app.command()(models.mirror)
app.add_typer(recipes.app, name="recipe")
app.add_typer(images.app, name="images")
app.add_typer(trigger.app, name="trigger")


def main() -> None:
    """Run the command line; a user's error prints without a traceback and exits 2."""
    _import_kfp_alone()
    try:
        app()
    except AssayError as error:
        print(f"assay: {error}", file=sys.stderr)
        sys.exit(2)


def _import_kfp_alone() -> None:
    """Import kfp without its client, which brings Kubernetes' (0.35 s of CPU) and is of use to a submission only.

    kfp leaves it out where it believes to be in a step; `kfp.dsl` must not believe so.
    """
    os.environ["_KFP_RUNTIME"] = "true"
    import kfp  # noqa: F401

    del os.environ["_KFP_RUNTIME"]


if __name__ == "__main__":
    main()
