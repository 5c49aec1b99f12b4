"""The pictures of a report, each as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MARKS = "osD^vPX*<>"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """All four; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for name, picture in (
        ("throughput-latency", _throughput), ("speedup", _speedup), ("acceptance", _acceptance), ("tpf-oh", _balance),
    ):  # fmt: skip
        heats = [t for t in report["asked"]["temperatures"] if _at(report, t)]
        if not heats:
            continue
        figure, axes = pyplot.subplots(
            1, len(heats), figsize=(1.6 + 4.6 * len(heats), 4.2), layout="constrained", squeeze=False, sharey=True
        )
        for axis, temperature in zip(axes[0], heats, strict=True):
            picture(axis, _at(report, temperature), _styles(report))
            if axis is not axes[0][0]:
                axis.set_ylabel("")
            axis.set_title("greedy" if temperature == 0 else f"temperature {temperature:g}")
            axis.grid(alpha=0.25)
        handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
        for suffix in ("png", "svg"):
            made.append(folder / f"{name}.{suffix}")
            figure.savefig(made[-1], dpi=130)
        pyplot.close(figure)
    return made


def _at(report: dict[str, Any], temperature: float) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["temperature"] == temperature]


def _styles(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour and mark of each method, the same in every picture; the first is black."""
    names = [method["name"] for method in report["asked"]["methods"]]
    made = {name: {"color": f"C{i - 1}", "marker": MARKS[i % len(MARKS)]} for i, name in enumerate(names)}
    made[names[0]] = {"color": "black", "marker": MARKS[0]}
    return made


def _lines(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _throughput(axis: Any, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    """All requests' rate by one request's: up and to the right is better; one point a concurrency."""
    for name, line in _lines(rows).items():
        x = [row["tokens_per_s_request"] for row in line]
        y = [row["tokens_per_s"]["median"] for row in line]
        axis.plot(x, y, label=name, **styles[name])
    first = next(iter(_lines(rows).values()))
    for row in first:
        place = (row["tokens_per_s_request"], row["tokens_per_s"]["median"])
        axis.annotate(f"{row['concurrency']} at a time", place, xytext=(6, 5), textcoords="offset points", fontsize=8)
    axis.margins(x=0.15)
    axis.set(xlabel="tokens/s of one request", ylabel="tokens/s of all requests", yscale="log")
    _plain_numbers(axis.yaxis)


def _speedup(axis: Any, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    """Speed-up by concurrency with the spread over rounds, and the break-even."""
    lines = _lines(rows)
    places = sorted({row["concurrency"] for row in rows})
    for number, (name, line) in enumerate(lines.items()):
        line = [row for row in line if row["speedup"]]
        middle = [row["speedup"]["median"] for row in line]
        below = [m - row["speedup"]["min"] for m, row in zip(middle, line, strict=True)]
        above = [row["speedup"]["max"] - m for m, row in zip(middle, line, strict=True)]
        aside = 0.04 * (number - len(lines) / 2)  # so that bars do not hide each other
        x = [places.index(row["concurrency"]) + aside for row in line]
        axis.errorbar(x, middle, yerr=[below, above], label=name, capsize=2, **styles[name])
    axis.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(places)), map(str, places))
    axis.set(xlabel="requests at a time", ylabel="speed-up over plain decoding")


def _acceptance(axis: Any, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    """Share of forwards that accepted each draft, at the least concurrency."""
    least = min(row["concurrency"] for row in rows)
    for row in rows:
        if row["concurrency"] == least and row["acceptance"]:
            places = range(1, len(row["acceptance"]) + 1)
            axis.plot(places, row["acceptance"], label=row["method"], **styles[row["method"]])
    axis.set(
        xlabel=f"draft ({least} request{'s' if least > 1 else ''} at a time)",
        ylabel="accepted, of forwards with drafts",
        ylim=(0, 1),
    )
    axis.xaxis.get_major_locator().set_params(integer=True)


def _balance(axis: Any, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    """Tokens a forward by what it costs: above the diagonal it pays; numbers are concurrency."""
    shown = [row for row in rows if row["OH"] and row["TPF"]]
    for name, line in _lines(shown).items():
        x, y = [row["OH"]["median"] for row in line], [row["TPF"] for row in line]
        axis.plot(x, y, label=name, linewidth=0.8, **styles[name])
        for row, *place in zip(line, x, y, strict=True):
            if place != [1, 1]:
                axis.annotate(str(row["concurrency"]), place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    most = max([row["OH"]["median"] for row in shown] + [1.5])
    high = max([row["TPF"] for row in shown] + [1.5])
    even = [0.8 + 0.01 * i for i in range(int(100 * most * 1.2))]
    axis.plot(even, even, color="grey", linewidth=0.8, linestyle="--")
    axis.set(xlabel="OH: time of a forward over plain's", ylabel="TPF: tokens a forward", xscale="log")
    axis.set(xlim=(0.8, most * 1.15), ylim=(0.9, high * 1.1))
    _plain_numbers(axis.xaxis)
    axis.text(0.03, 0.97, "faster", transform=axis.transAxes, va="top", color="grey")
    axis.text(0.97, 0.03, "slower", transform=axis.transAxes, ha="right", color="grey")


def _plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers, three a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
