"""Tables and plots of comparisons."""

import json

from mama_trl.compare.tables import comparison_table, write_comparison


def comparison():
    levels = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    rows = [
        {
            "method": m, "sparsity": s, "nats": n + s, "deviation": 0.05, "perplexity": 10 ** (5 * s), "excess": n,
            "seeds": 3,
        }
        for m, n in (("magnitude", 3.0), ("sparsegpt", 2.0), ("mama", 1.0)) for s in levels
    ]
    protocol = {
        "tokens": 32640, "sequence_length": 256, "calibration_tokens": 32768, "seeds": [0, 1, 2], "text": "a/held.txt"
    }
    return {"model": "m", "dense": 12.0, "vocabulary": 512, "protocol": protocol, "rows": rows, "trials": []}


def test_comparison_files(tmp_path):
    result = comparison()
    write_comparison(result, tmp_path, "levels")
    assert json.loads((tmp_path / "levels.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "levels.csv").read_text().splitlines()[1].startswith("magnitude,0.5,3.5,0.05,")
    assert (tmp_path / "levels.png").stat().st_size > 5000


def test_the_table_of_seven_levels_fits_a_terminal():
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(comparison_table(comparison()))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100 and not any("…" in line for line in lines)
    assert any("±5.0%" in line for line in lines)
