"""The model card: what a version is for, what it was made from, how it was measured, and where that ends."""

from collections.abc import Iterable, Mapping
from typing import Any

from assay.components.contracts.recipe import Recipe


def model_card(recipe: Recipe, decision: Mapping[str, Any], counts: Mapping[str, int], tags: Mapping[str, str]) -> str:
    """Return a model card in Markdown, with the front matter that model hubs read.

    Args:
        recipe: Its title says what the model is for.
        decision: The gate's record, with every arm's table.
        counts: Rows by split.
        tags: The version's digests.
    """
    sections = [
        f"# {recipe.name}\n\n{recipe.title or 'A language model for one task.'}",
        _use(recipe),
        "## Training\n\n" + _training(recipe),
        "## Data\n\n" + _table(("split", "rows"), ((name, str(rows)) for name, rows in counts.items())),
        _evaluation(decision),
        _decision(decision),
        _limits(recipe, decision),
        _licence(recipe),
        _verify(recipe),
        "## Lineage (sha256)\n\n" + _table(("what", "digest"), ((name, f"`{text}`") for name, text in tags.items())),
    ]
    return _front_matter(recipe) + "\n\n".join(sections) + "\n"


def _front_matter(recipe: Recipe) -> str:
    pipeline = "feature-extraction" if recipe.graph == "retrieval" else "text-generation"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {pipeline}\n"
        f"tags: [assay, {recipe.task}]\nbase_model_reference: {recipe.base_model!r}\n---\n\n"
    )


def _use(recipe: Recipe) -> str:
    how = "with the prompts that the task writes and greedy decoding"
    if recipe.graph == "retrieval":
        how = "as an encoder in the way that `embedding.json` says, by `assay serve`; it answers nothing itself"
    return f"## Intended use\n\nThe task `{recipe.task}`, {how}: this is what was measured. Any other use was not."


def _training(recipe: Recipe) -> str:
    stages = {title: getattr(recipe, name) for name, title in recipe.stages.items()}
    used = [f"{title} ({stage.manner})" for title, stage in stages.items()]
    return (
        f"From `{recipe.base_model}` by {', then '.join(used)}; a stage that did not help was not built upon. "
        f"Seed {recipe.seed}."
    )


def _evaluation(decision: Mapping[str, Any]) -> str:
    rows = (
        (arm, metric, _number(value.get("mean")), _interval(value), str(value.get("n", "")))
        for name in ("arms", "benchmarks")
        for arm, metrics in decision.get(name, {}).items()
        for metric, value in metrics.items()
    )
    head = ("arm", "metric", "mean", "interval", "n")
    what = "On held-out rows and, where benchmarks were asked, on theirs; the same for every arm."
    return f"## Evaluation\n\n{what}\n\n{_table(head, rows)}"


def _decision(decision: Mapping[str, Any]) -> str:
    rows = (
        (
            str(row.get("metric")),
            _asked(row),
            _number(row.get("difference")),
            _interval(row),
            _number(row.get("p_value")),
            {True: "passed", False: "failed", None: "open"}[row.get("passed")],
        )
        for row in decision.get("criteria", [])
    )
    head = ("metric", "asked", "difference", "interval", "p", "result")
    return f"## Why it was promoted\n\n{decision.get('reason', '')}\n\n{_table(head, rows)}"


def _asked(row: Mapping[str, Any]) -> str:
    absolute = row.get("test") == "bound"
    return f"bound {row.get('reference')}" if absolute else f"{row.get('test')} to {row.get('versus')}"


def _limits(recipe: Recipe, decision: Mapping[str, Any]) -> str:
    return (
        "## Limits\n\n"
        f"- Measured on {decision.get('examples', 'the')} held-out rows of this task; rows that look different "
        "were not measured.\n"
        "- The intervals are of sampling rows; they do not cover rows that are all wrong in the same way.\n"
        f"- What the title says of its use holds here too: {recipe.title or 'none given'}"
    )


def _licence(recipe: Recipe) -> str:
    return (
        f"## Licence\n\nA model made from `{recipe.base_model}` is bound by its licence, and by that of the rows it "
        "learned from. Neither was checked; the licences of the libraries stand in `sbom.cdx.json`."
    )


def _verify(recipe: Recipe) -> str:
    people = recipe.approval.required
    asked = f"People who must approve it before it can become champion: {people}. " if people else ""
    return (
        f"## How to verify\n\n{asked}`assay verify {recipe.name}` computes everything below again: the ledger's chain, "
        "the decision, this card, every file, and the artifacts it was made from. `sbom.cdx.json` (CycloneDX 1.6) "
        f"lists files, data and libraries with their hashes; `assay history {recipe.name}` says who did what, and when."
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row.get("low"), row.get("high")
    return "" if low is None and high is None else f"[{_number(low)}, {_number(high)}]"
