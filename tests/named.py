"""Names of parameters: the same in every process, or workers collect different tests."""

import re


def axes_id(axes: object) -> str:
    """`str` of axes, objects by their class: no address."""
    return re.sub(r"<(?:\w+\.)*(\w+) object at 0x\w+>", r"\1", str(axes))
