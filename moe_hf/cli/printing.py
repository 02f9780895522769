"""How the commands print numbers and tables."""

from collections.abc import Iterable


def count_text(number: int) -> str:
    """`1,234,567 (1.23 M)`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number:,} ({number / size:.2f} {unit})"
    return str(number)


def bytes_text(size: int) -> str:
    """In MiB, or GiB from one on."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


def print_rows(title: str, rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Print a table whose first column names what the others tell.

    Args:
        title (`str`): above the table.
        rows (`Iterable[tuple[str, ...]]`): of equal length.
        header (`tuple[str, ...]`): over the columns after the first.
    """
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(title=title, title_justify="left", show_header=bool(header), box=None, pad_edge=False)
    table.add_column(style="bold")
    for index in range(1, len(rows[0])):
        table.add_column(header[index - 1] if header else "", justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
