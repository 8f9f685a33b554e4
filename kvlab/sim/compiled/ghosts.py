"""Ghost lists: `policy.queues.Ghosts` on the rows of contents, several to a policy.

List g has the columns LISTS + 2 g (next) and LISTS + 2 g + 1 (previous), and the row END as its
end; 0 as next is in no list.
"""

from __future__ import annotations

from kvlab.sim.compiled.bind import verb
from kvlab.sim.compiled.state import END, GHOSTS, LISTS


@verb
def knows(s, list, content):
    return s.content[content, LISTS + 2 * list] != 0


@verb
def count(s, list):
    return s.book[GHOSTS + list]


@verb
def forget(s, list, content):
    """Take out a content that is in the list."""
    table, after = s.content, LISTS + 2 * list
    before = after + 1
    left, right = table[content, before], table[content, after]
    table[left, after] = right
    table[right, before] = left
    table[content, after] = 0
    s.book[GHOSTS + list] -= 1


@verb
def remember(s, list, content, limit):
    """Note a content as the newest, and forget the oldest beyond the limit."""
    table, after = s.content, LISTS + 2 * list
    before = after + 1
    if knows(s, list, content):
        forget(s, list, content)
    last = table[END, before]
    table[last, after] = content
    table[content, before], table[content, after] = last, END
    table[END, before] = content
    s.book[GHOSTS + list] += 1
    while s.book[GHOSTS + list] > limit:
        drop_oldest(s, list)


@verb
def drop_oldest(s, list):
    if s.book[GHOSTS + list]:
        forget(s, list, s.content[END, LISTS + 2 * list])
