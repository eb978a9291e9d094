"""The table of a packed model."""

import io

from rich.console import Console

from graphprune.packing.report import Layer, Packing


def test_layers_of_one_kind_share_a_row() -> None:
    kept = tuple(Layer(f"{i}.up", (8, 4), 0.5, "bitmap", 128, 80) for i in range(3))
    left = tuple(
        Layer(f"{i}.down", (4, 8), 0.1 * i, "dense", 128, 128, f"row {i} is too full")
        for i in range(5)
    )
    one = Layer("head", (4, 8), 0.0, "dense", 128, 128, "it is tied")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(Packing("in", "out", (*kept, *left, one), 2000, 1000).render())
    text = console.export_text()
    rows = [[c.strip() for c in r.strip("│").split("│")] for r in text.splitlines() if "│" in r]
    assert rows == [
        ["3", "8 x 4", "50%", "bitmap", "0.0", "0.0", ""],
        [
            "5",
            "4 x 8",
            "20%",
            "dense",
            "0.0",
            "0.0",
            "for instance: row 0 is too full",
        ],
        ["1", "4 x 8", "0%", "dense", "0.0", "0.0", "it is tied"],
    ]
    assert "(50%): out" in text
