"""pytest plugin for TRITON_INTERPRET=1: what the interpreter needs to run with today's NumPy.

Triton 3.6 converts the one-element arrays that stand for its scalars by int(), which NumPy 2.4
refuses for arrays that have a dimension.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_index
