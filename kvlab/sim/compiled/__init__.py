"""Compiled replay (needs numba, the extra `fast`): the decisions of the policy objects on arrays.

`state` is the layout, `lines`, `order` and `ghosts` are what policies are built of, one small file
a policy; `request` is the one loop of a request and `flat` that of single accesses, both bound to
a policy by `bind`. The objects stay the reference: equal victims in the same order.
"""
