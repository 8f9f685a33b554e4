"""A few PTX instructions in plain Python, so that inline assembly is tested where no GPU is."""

import re
import struct

import numpy as np

WORD = 0xFFFFFFFF


def single(x: float) -> float:
    return float(np.float32(x))


def prmt(a: int, b: int, select: int) -> int:
    source = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    return sum(source[(select >> 4 * i) & 7] << 8 * i for i in range(4))


def lop3(a: int, b: int, c: int, table: int) -> int:
    out = 0
    for bit in range(32):
        index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        out |= (table >> index & 1) << bit
    return out


KNOWN = {
    "prmt": prmt, "lop3": lop3, "and": lambda a, b: a & b,
    "shl": lambda a, n: (a << n) & WORD, "shr": lambda a, n: a >> n,
    "fma": lambda a, b, c: single(a * b + c), "add": lambda a, b: single(a + b),
    "sub": lambda a, b: single(a - b),
}


def run(text: str, inputs: list, outputs: int) -> list:
    """The values of $0 .. of an inline assembly text; inputs: those of the operands behind them."""
    held = {f"${outputs + i}": x for i, x in enumerate(inputs)}

    def value(word: str):
        if word.startswith("0f"):
            return struct.unpack(">f", bytes.fromhex(word[2:]))[0]
        return held[word] if word in held else int(word, 0)

    for line in text.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, _, rest = line.strip().partition(" ")
        target, *words = re.split(r",\s*", rest.strip())
        kind, *how = name.split(".")
        x = KNOWN[kind](*map(value, words))
        held[target] = min(max(x, 0.0), 1.0) if "sat" in how else x
    return [held[f"${i}"] for i in range(outputs)]
