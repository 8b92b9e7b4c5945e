"""The errors of a test as a table, with those that others have published beside them."""

from collections.abc import Mapping

from atomeq.cli.terminal import say, show_table
from atomeq.training.published import PublishedErrors

_OURS = "measured"


def show_errors(
    results: Mapping[str, Mapping[str, float]],
    columns: Mapping[str, tuple[str, str]],
    published: PublishedErrors | None = None,
) -> None:
    """Print a line for each set, and one for each method that was published on it.

    Args:
        results: Errors by set and name.
        columns: Title and unit by name.
        published: Errors of others.
    """
    published = published or PublishedErrors()
    lines = [
        (name, who, errors)
        for name, own in results.items()
        for who, errors in ((_OURS, own), *published.of(name, columns).items())
    ]
    shown = [column for column in columns if any(column in errors for *_, errors in lines)]
    beside = any(who != _OURS for _, who, _ in lines)
    show_table(
        ["set", *["by"] * beside, *("\n".join(columns[column]) for column in shown)],
        [
            [
                *(name if who == _OURS else "", *[who] * beside),
                *(f"{errors[column]:.4g}" if column in errors else "-" for column in shown),
            ]
            for name, who, errors in lines
        ],
        most=len(lines),
    )
    if beside:
        say(f"published: {published.source}")
