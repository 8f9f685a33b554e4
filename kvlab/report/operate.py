"""An operator's page: miss ratios by policy, what a tier buys, hits over time, hot prefixes.

Takes the rows of `job=operate`. Lines carry their names at their ends; there are no legends.
"""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvlab.report import canvas
from kvlab.report.hit_rates import NAMES, Picture, hits, is_bound, traces
from kvlab.report.names import interval
from kvlab.report.tables import Table

TIER, GAIN, WINDOW, HOT = (
    "tier_hit_percent", "gain_over_lru_points", "window_hit_percent", "prefix_hits_percent",
)  # fmt: skip
SHADES = ("#0072B2", "#56B4E9", "#9fd0ee", "#cfe7f6", "#e7f3fb")


def is_operators(rows: list[dict]) -> bool:
    return any(row["name"] == TIER for row in rows)


def pictures(rows: list[dict]) -> list[Picture]:
    """The figures of such rows, none for others."""
    if not is_operators(rows):
        return []
    found = [
        Picture(
            "miss_ratios", "Miss ratio over capacity, by policy",
            "Block misses; bands are 95 % intervals over sessions. Dashed: no policy misses less.",
            lambda: miss_ratios(rows),
        ),
        Picture(
            "tiers", "What a host tier buys",
            "Block hits under LRU of the device alone and with an exclusive host tier of so many "
            "devices behind it.",
            lambda: tiers(rows),
        ),
    ]  # fmt: skip
    if hits(rows, WINDOW):
        caption = "Block hits of the requests of each window, at the middle capacity."
        found.append(Picture("over_time", "Hits over time", caption, lambda: over_time(rows)))
    return found


def miss_ratios(rows: list[dict]) -> Figure:
    shown = hits(rows)
    made, panels = _panels(shown, "block misses, % of accesses ↓")
    for trace, axes in panels:
        mine = _of(shown, trace)
        ends = []
        for index, policy in enumerate(dict.fromkeys(row["variant"] for row in mine)):
            line = _points(mine, policy, "capacity_blocks")
            x, y = [at for at, _ in line], [100 - row["value"] for _, row in line]
            bound = is_bound(policy)
            colour = "#000000" if bound else canvas.COLOURS[index % 6]
            axes.plot(x, y, color=colour, linestyle="--" if bound else "-", linewidth=1.8)
            if not bound and all(row.get("low") is not None for _, row in line):
                bands = [[100 - row[end] for _, row in line] for end in ("high", "low")]
                axes.fill_between(x, *bands, color=colour, alpha=0.12, linewidth=0)
            ends.append((x[-1], y[-1], NAMES.get(policy, policy), colour))
        axes.set_xscale("log")
        axes.set_xticks(sorted({row["params"]["capacity_blocks"] for row in mine}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelrotation=45)
        axes.set_xlabel(f"capacity, blocks of {mine[0]['params']['trace_block_size']} tokens")
        axes.set_ylim(0, 100)
        _name_ends(axes, ends)
    return made


def tiers(rows: list[dict]) -> Figure:
    shown = hits(rows, TIER)
    made, panels = _panels(shown, "block hits, % of accesses ↑")
    for trace, axes in panels:
        mine = _of(shown, trace)
        capacities = sorted({row["params"]["capacity_blocks"] for row in mine})
        for at, capacity in enumerate(capacities):
            here = [row for row in mine if row["params"]["capacity_blocks"] == capacity]
            _stack(axes, at, capacity, here)
        axes.set_xticks(range(len(capacities)), [f"{c:,}" for c in capacities], rotation=45)
        axes.set_xlabel("device, blocks")
        axes.set_ylim(0, 100)
        axes.grid(visible=False, axis="x")
    return made


def _stack(axes: Axes, at: int, capacity: int, rows: list[dict]) -> None:
    """One bar: the device's hits, and what each larger tier adds, with its name where it fits."""
    below = 0.0
    for index, row in enumerate(sorted(rows, key=lambda row: row["params"]["host_blocks"])):
        multiple = row["params"]["host_blocks"] / capacity
        added = max(row["value"] - below, 0.0)
        axes.bar(at, added, 0.8, bottom=below, color=SHADES[min(index, 4)], edgecolor="white")
        if added >= 4:
            name = f"{added:.0f}" if not multiple else f"×{multiple:g} +{added:.0f}"
            colour = "white" if index == 0 else "black"
            middle = below + added / 2
            axes.text(at, middle, name, ha="center", va="center", fontsize=8, color=colour)
        below = max(below, row["value"])


def over_time(rows: list[dict]) -> Figure:
    shown = hits(rows, WINDOW)
    made, panels = _panels(shown, "block hits, % of accesses ↑")
    for trace, axes in panels:
        mine, ends = _of(shown, trace), []
        for index, policy in enumerate(dict.fromkeys(row["variant"] for row in mine)):
            line = _points(mine, policy, "window_seconds")
            x, y = [at / 60 for at, _ in line], [row["value"] for _, row in line]
            colour = canvas.COLOURS[index % 6]
            axes.plot(x, y, color=colour, linewidth=1.5)
            ends.append((x[-1], y[-1], NAMES.get(policy, policy), colour))
        axes.set_xlabel("minutes of the trace")
        axes.set_ylim(bottom=0)
        _name_ends(axes, ends)
    return made


def _panels(rows: list[dict], label: str) -> tuple[Figure, list[tuple[str, Axes]]]:
    named = traces(rows)
    made, panels = canvas.figure(len(named), width=5.6 * len(named) + 0.4, height=4.4)
    for name, axes in zip(named, panels):
        axes.set_title(name, loc="left")
    panels[0].set_ylabel(label)
    return made, list(zip(named, panels))


def _of(rows: list[dict], trace: str) -> list[dict]:
    return [row for row in rows if row["params"].get("trace") == trace]


def _points(rows: list[dict], policy: str, x: str) -> list[tuple[float, dict]]:
    mine = [(row["params"][x], row) for row in rows if row["variant"] == policy]
    return sorted(mine, key=lambda pair: pair[0])


def _name_ends(axes: Axes, ends: list[tuple]) -> None:
    """The name of each line right of its end, moved apart where ends lie close together."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[1])
    for (x, _, name, colour), at in zip(ends, apart([end[1] for end in ends], (high - low) / 22)):
        axes.annotate(
            f" {name}", (x, at), color=colour, fontsize=9, va="center", annotation_clip=False
        )
    axes.margins(x=0.02)


def apart(rising: list[float], least: float) -> list[float]:
    """Places at least so far apart that lie as near to the rising values as they can: what is too
    close together is spread around its mean."""
    pools: list[tuple[float, int]] = []  # (mean of value - index * least, members)
    for index, value in enumerate(rising):
        mean, count = value - index * least, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return [mean + index * least for index, mean in enumerate(means)]


def tables(rows: list[dict]) -> list[Table]:
    """Hit rates by policy and capacity with their intervals, and the prefixes that save most."""
    shown = hits(rows)
    places = list(dict.fromkeys(map(_place, shown)))
    table = Table("Block hits, %")
    table.column("trace", [trace for trace, _ in places], numeric=False)
    table.column("capacity, blocks", [f"{capacity:,}" for _, capacity in places])
    for policy in dict.fromkeys(row["variant"] for row in shown):
        found = {_place(row): row for row in shown if row["variant"] == policy}
        cells = [_cell(found[place]) if place in found else "" for place in places]
        table.column(NAMES.get(policy, policy), cells)
    return [table, *_hot(rows)]


def _place(row: dict) -> tuple[str, int]:
    return row["params"]["trace"], row["params"]["capacity_blocks"]


def _cell(row: dict) -> str:
    return interval(row["value"], row.get("low"), row.get("high"))


def _hot(rows: list[dict]) -> list[Table]:
    shown = hits(rows, HOT)
    if not shown:
        return []
    table = Table("Hot prefixes")
    table.column("trace", [row["params"]["trace"] for row in shown], numeric=False)
    told = {"requests": "requests", "blocks": "blocks", "from block": "first_block",
            "last id": "last_id"}  # fmt: skip
    for heading, key in told.items():
        table.column(heading, [f"{row['params'][key]:,}" for row in shown])
    table.column("of all hits there can be, %", [f"{row['value']:.2f}" for row in shown])
    return [table]


def advice(rows: list[dict]) -> list[str]:
    """For each trace: the policy to take, what is left for any, what a tier adds."""
    if not is_operators(rows):
        return []
    return [" ".join(_sentences(rows, trace)) for trace in traces(rows)]


def _sentences(rows: list[dict], trace: str) -> Iterator[str]:
    mine = _of(rows, trace)
    capacities = sorted({row["params"]["capacity_blocks"] for row in hits(mine)})
    capacity = capacities[len(capacities) // 2]
    here = [r for r in mine if r["params"].get("capacity_blocks") == capacity]
    rates = {row["variant"]: row for row in hits(here)}
    lru, bound = rates["lru"], next((rates[name] for name in rates if is_bound(name)), None)
    yield f"**{trace}**, {capacity:,} blocks: LRU hits {_told(lru, ' %')} of the blocks."
    sure = [r for r in hits(here, GAIN) if r.get("low") is not None and r["low"] > 0]
    if sure:
        best = max(sure, key=lambda row: row["value"])
        yield f"Take {best['variant']}: {_told(best, ' points')} more than LRU."
    else:
        yield "No policy tried is surely better than LRU; keep it."
    if bound is not None:
        top = max(row["value"] for name, row in rates.items() if not is_bound(name))
        yield f"At most {bound['value'] - top:.1f} points more are left for any policy."
    tier = {r["params"]["host_blocks"]: r["value"] for r in hits(here, TIER)}
    if len(tier) > 1:
        first, last = sorted(tier)[1], max(tier)
        yield (
            f"A host tier of {first:,} blocks adds {tier[first] - tier[0]:.1f} points under LRU, "
            f"one of {last:,} adds {tier[last] - tier[0]:.1f}."
        )


def _told(row: dict, unit: str) -> str:
    if row.get("low") is None:
        return f"{row['value']:.1f}{unit} (one session: no interval)"
    return f"{row['value']:.1f}{unit} [{row['low']:.1f}, {row['high']:.1f}]"
