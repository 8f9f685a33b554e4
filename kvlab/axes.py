"""One table of the axes: what members there are, where they live, which one does nothing.

Plain data: a member is named by the dotted path of its class, which is imported when it is asked
for. So a lower room can offer a member of a higher one (`summary=text`), and nobody registers
anything by being imported. A member from outside the package is named by its dotted path,
`policy=my_module.MyPolicy`. What a member can do is asked of the member (`scored`, `keeps`,
`makes`, `selects`, ...), never read off its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import NamedTuple

from kvlab.core import BadInput


class Member(NamedTuple):
    """path: of what makes it. told: one line of text. given: arguments that are always passed."""

    path: str
    told: str
    given: dict = {}  # noqa: RUF012 -- read only


class Axis(NamedTuple):
    """name: also its config group, where `conf`. null: the member that changes nothing.

    apart: whether caches that differ in it are told apart otherwise than by a member's class and
    settings: formats by identity, policies by what is made, sharing by no number at all.
    """

    name: str
    null: str
    members: dict[str, Member]
    conf: bool = True
    apart: bool = False


def _axis(name: str, null: str, room: str, members: dict[str, tuple[str, str]], **more) -> Axis:
    """Members given as name -> (class in `room` or a dotted path, one line of text)."""
    table = {
        short: Member(where if "." in where else f"{room}.{where}", told)
        for short, (where, told) in members.items()
    }
    return Axis(name, null, table, **more)


def _format(
    name: str, told: str, key: str = "", value: str = "", sinks: int = 0
) -> tuple[str, Member]:
    """A format is a codec for keys and one for values, each by its own name; sinks: first tokens
    that stay as they were computed."""
    stored = {"name": name, "key": key or name, "value": value or name, "sinks": sinks}
    return name, Member("kvlab.format.shipped", told, stored)


_FORMATS = dict([
    _format("fp32", "both in 32 bits"),
    _format("fp16", "both in 16 bits, 10 of them mantissa"),
    _format("bf16", "both in 16 bits, 7 of them mantissa"),
    _format("fp8", "both in 8 bits, e4m3"),
    _format("fp8c", "both in 8 bits, e4m3, keys around their channels' middles", "fp8c", "fp8"),
    _format("int8", "both in 8-bit integers"),
    _format("int4", "both in 4-bit integers"),
    _format("int3", "both in 3-bit integers"),
    _format("int2", "both in 2-bit integers"),
    _format("k8v4", "keys in 8 bits, values in 4", "int8", "int4"),
    _format("k4v2", "keys in 4 bits, values in 2", "int4", "int2"),
    _format("k3v2", "keys in 3 bits, values in 2", "int3", "int2"),
    _format("int4g", "both in 4-bit integers, scales for groups of 32", sinks=4),
    _format("int3g", "3-bit integers, values turned, scales for groups of 32", sinks=4),
    _format("k4v2g", "keys in 4 bits, turned values in 2, groups of 32", "int4g", "int2g", sinks=4),
    _format("k3v2g", "keys in 3 bits, turned values in 2, groups of 32", "int3g", "int2g", sinks=4),
    _format("int2g", "2-bit integers, values turned, scales for groups of 32", sinks=4),
    ("by_layer", Member("kvlab.format.ByLayer", "a format for each layer")),
])  # fmt: skip

TABLE: dict[str, Axis] = {axis.name: axis for axis in (
    Axis("format", "bf16", _FORMATS, apart=True),
    _axis("policy", "none", "kvlab.policy", {
        "adaptive": ("Adaptive", "experts weighted by what their evictions cost"),
        "admit_cost": ("AdmitCost", "another policy, short prompts wait at its door"),
        "admit_reuse": ("AdmitReuse", "another policy, what was asked for once waits at its door"),
        "arc": ("ARC", "recency and frequency, balanced by ghost hits"),
        "attention_mass": ("AttentionMass", "least attention from those who saw it leaves"),
        "belady": ("Belady", "farthest next use leaves; needs the future"),
        "compactor": ("Compactor", "least leverage and attention nearby leaves"),
        "expected_attention": ("ExpectedAttention", "least attention to be expected leaves"),
        "fifo": ("FIFO", "oldest leaves"),
        "gdsf": ("GDSF", "least frequency times cost over size leaves"),
        "h2o": ("H2O", "least attention in sum leaves (H2O)"),
        "hybrid": ("Hybrid", "a weighted sum of recency, frequency and attention"),
        "keep_until_return": ("KeepUntilReturn", "LRU, but what waits for a tool stays"),
        "key_diff": ("KeyDiff", "keys like the others leave"),
        "key_norm": ("KeyNorm", "largest keys leave"),
        "kvzip": ("KVzip", "what a repetition of the context looks at least leaves"),
        "lagkv": ("LagKV", "what sticks out least, measured by later tokens, leaves"),
        "leaf_first": ("LeafFirst", "another policy, leaves of the prefix tree first"),
        "learned": ("Learned", "least likely to be used soon leaves; learned from the future"),
        "lfu": ("LFU", "least used leaves"),
        "lru": ("LRU", "least recently used leaves"),
        "mq": ("MQ", "queues by frequency, with lifetimes"),
        "none": ("NoEviction", "nothing leaves"),
        "pgdsf": ("PGDSF", "GDSF by leaves, at the cost of computing on a prefix"),
        "priority": ("Priority", "lowest level given by the user leaves"),
        "random": ("Random", "any may leave: a control"),
        "request_arc": ("RequestARC", "ARC that counts a request once"),
        "request_lfu": ("RequestLFU", "used by the fewest requests leaves"),
        "rkv": ("RKV", "least attention and most repetition leave (R-KV)"),
        "s3fifo": ("S3FIFO", "a small queue filters a main one"),
        "shuffled": ("Shuffled", "another policy, scores dealt to other blocks: a control"),
        "sieve": ("SIEVE", "a hand passes over what was used"),
        "snapkv": ("SnapKV", "least attention of the last queries leaves"),
        "tova": ("TOVA", "least attention of the newest token leaves"),
        "triattention": ("TriAttention", "least attention from where queries point leaves"),
        "ttl": ("TTL", "LRU, and what was not used for some minutes is gone"),
        "wa_lru": ("WALRU", "age, chance of reuse and size, weighed together (SAGA)"),
    }, apart=True),
    _axis("window", "none", "kvlab.window", {
        "none": ("NoWindow", "everything may be read"),
        "sink": ("SinkWindow", "the first and the newest tokens stay"),
    }),
    _axis("prefix", "none", "kvlab.blocks", {
        "none": ("NoSharing", "each sequence holds its own blocks"),
        "hash": ("HashSharing", "equal beginnings share blocks"),
    }, apart=True),
    _axis("summary", "none", "kvlab.summary", {
        "none": ("NoSummary", "evicted blocks leave a hole"),
        "merged": ("Merged", "centroids of evicted tokens"),
        "fitted": ("Fitted", "entries fitted to what attention asks"),
        "merge_mean": ("MergeMean", "means of neighbours"),
        "random": ("RandomTokens", "tokens drawn by chance: a control"),
        "text": ("kvlab.model.TextSummary", "the model's own words"),
    }),
    _axis("retrieval", "none", "kvlab.retrieval", {
        "none": ("NoRetrieval", "a token reads all blocks"),
        "quest": ("Quest", "by bounds of a block's keys"),
        "mean_key": ("MeanKey", "by the mean of a block's keys"),
        "random": ("RandomChoice", "by chance: a control"),
    }),
    _axis("offload", "none", "kvlab.offload", {
        "none": ("NoOffload", "an evicted block is gone"),
        "host": ("HostStore", "an evicted block lies in host memory"),
    }),
    _axis("budget", "equal", "kvlab.budget", {
        "equal": ("Equal", "every layer may hold as many blocks"),
        "pyramid": ("Pyramid", "lower layers may hold more than upper ones (PyramidKV)"),
        "simlayer": ("SimLayer", "layers that look at the window alone hold no more (SimLayerKV)"),
        "shares": ("Shares", "given shares, one for each layer group"),
        "adakv": ("AdaKV", "the best tokens of all heads of a layer (AdaKV)"),
        "all_heads": ("AllHeads", "the best tokens of all heads of all layers (KVzip)"),
        "duo": ("DuoAttention", "retrieving heads hold all, others the window (DuoAttention)"),
    }),
    _axis("observes", "mass", "kvlab.cache.scores", {
        "mass": ("Mass", "share of attention, a mean over steps"),
        "snapkv": ("SnapKV", "attention of the last queries, pooled over neighbours"),
        "expected_attention": ("kvlab.cache.expected.ExpectedAttention",
                               "attention to be expected, times values"),
        "compactor": ("kvlab.cache.leverage.Compactor", "leverage of keys, and attention nearby"),
        "key_diff": ("kvlab.cache.keys.KeyDiff", "how unlike the others a key is"),
        "key_norm": ("kvlab.cache.keys.KeyNorm", "the inverse of the keys' norm"),
        "h2o": ("kvlab.cache.observed.H2O", "attention of all queries, their sum"),
        "kvzip": ("kvlab.cache.repeated.KVzip", "attention while the context is repeated"),
        "lagkv": ("kvlab.cache.keys.LagKV", "channels that stick out of the range of later ones"),
        "observed": ("kvlab.cache.observed.Observed", "attention of all that saw it, their mean"),
        "random": ("kvlab.cache.keys.RandomScore", "drawn by chance: a control"),
        "rkv": ("kvlab.cache.redundancy.RKV", "attention, less what other keys say too"),
        "tova": ("TOVA", "attention of the last token"),
        "triattention": ("kvlab.cache.trigonometric.TriAttention",
                         "a series in the distance to where queries point"),
    }, conf=False),
)}  # fmt: skip
AXES = tuple(name for name, axis in TABLE.items() if axis.conf)

_NAMED: dict[tuple[str, str], Callable] = {}  # members from outside that carry a short name


def names(axis: str) -> list[str]:
    """Short names of kvlab's own members, in the order of the table."""
    return list(TABLE[axis].members)


def is_outside(axis: str, name: str) -> bool:
    """Whether a name is that of a member from outside the package, by its form or as enlisted."""
    return name not in TABLE[axis].members and ((axis, name) in _NAMED or "." in name)


def by_name(axis: str, name: str, **parameters) -> object:
    """A member by its short name or dotted path, with its defaults but for `parameters`.

    Raises `BadInput`, which lists the known names, for an unknown one.
    """
    return find(axis, name)(**parameters)


def find(axis: str, name: str) -> Callable:
    """What makes the member: its class, mostly. Raises `BadInput` for an unknown one."""
    if (axis, name) in _NAMED:
        return _NAMED[axis, name]
    member = TABLE[axis].members.get(name)
    if member is not None:
        made = load(axis, member.path)
        return partial(made, **member.given) if member.given else made
    if "." in name:
        return load(axis, name)
    known = sorted([*TABLE[axis].members, *(n for at, n in _NAMED if at == axis)])
    raise BadInput(axis, name, f"known: {', '.join(known)}; or the dotted path of a class")


def load(axis: str, path: str) -> Callable:
    """The class at a dotted path. Raises `BadInput` where there is none."""
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, ValueError) as error:  # of a name without a module, too
        raise BadInput(axis, path, f"cannot be imported: {error}") from error
    except AttributeError as error:
        raise BadInput(axis, path, f"{module} has no {attribute} that could be imported"
                       ) from error
    if not callable(found):
        raise BadInput(axis, path, "cannot be called; name a class, or a function that makes one")
    return found


def enlist(axis: str, name: str, made: Callable) -> None:
    """Let a member from outside the package be asked for by a short name of its own.

    Raises `BadInput` for the name of one of ours: results would be taken for its.
    """
    if name in TABLE[axis].members:
        raise BadInput(axis, name, f"is the name of kvlab's own; give {made.__name__} another one")
    _NAMED[axis, name] = made


def with_axes(cls: type) -> type:
    """A field for each axis before the other fields of a dataclass, its null member by default;
    annotated with the root of the members' classes."""
    kinds = {axis: type(by_name(axis, TABLE[axis].null)).__mro__[-2] | str for axis in AXES}
    cls.__annotations__ = kinds | cls.__annotations__
    for axis in AXES:
        setattr(cls, axis, TABLE[axis].null)
    return cls


def alike() -> list[str]:
    """Axes whose members are compared by class and settings."""
    return [name for name in AXES if not TABLE[name].apart]


def is_null(axis: str, member: object) -> bool:
    """Whether a member of `axis` is the one that changes nothing."""
    return type(member) is find(axis, TABLE[axis].null)


# ---- what a choice is called

_BUDGETS = {"cache.budget_percent": "{}%", "cache.budget_blocks": "{} blocks",
            "cache.budget_bytes": "{} bytes"}  # fmt: skip


def label(settings: dict[str, object]) -> str:
    """A short readable name: `int8 lru 10%`; keys that no axis names stay `key=value`."""
    return " ".join(_word(key, value) for key, value in settings.items())


def _word(key: str, value: object) -> str:
    if key in AXES:
        return f"no {key}" if value in ("none", None) else str(value)
    if key in _BUDGETS and value is not None:
        return _BUDGETS[key].format(value)
    return f"{key}={value}"


def of_members(settings: dict[str, object]) -> dict[str, object]:
    """A member given by its class, `policy._target_=my_module.MyPolicy`, in place of the option
    that it was laid over, by its short name or, without one, by its path: what a variant is called
    after and what its rows say."""
    found = {}
    for key, value in settings.items():
        axis = key.removesuffix("._target_")
        path = settings.get(f"{axis}._target_") if axis in AXES else None
        if path is None:
            found[key] = value
        else:
            found[axis] = getattr(load(axis, str(path)), "name", None) or path
    return found
