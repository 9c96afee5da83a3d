"""One way for controllers, pruners and projectors to change a model that somebody else built.

    with thing.attached(model):
        model.generate(**inputs)

    handle = thing.attach(model)
    handle.remove()

Every change is registered on the handle together with its undoing, so detaching leaves no trace, even if attaching
fails half-way or the body raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .errors import InvalidInputError

__all__ = ["Attachable", "Handle"]

_MISSING = object()


class Handle:
    """The changes made to one model, undone in reverse order by `remove()`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._active = True

    @property
    def active(self) -> bool:
        """Whether the changes are in force."""
        return self._active

    def undo_with(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Register what undoes a change just made."""
        self._stack.callback(function, *args, **kwargs)

    def hook(self, hook: Any) -> None:
        """Register a `torch.utils.hooks.RemovableHandle` (or anything with `remove()`)."""
        self._stack.callback(hook.remove)

    def replace(self, owner: Any, attribute: str, value: Any) -> None:
        """Set `owner.attribute` and restore it on removal.

        An attribute that was only inherited from the class is deleted from the instance again, so `vars(owner)` ends
        as it began.
        """
        before = vars(owner).get(attribute, _MISSING)
        setattr(owner, attribute, value)
        if before is _MISSING:
            self._stack.callback(delattr, owner, attribute)
        else:
            self._stack.callback(setattr, owner, attribute, before)

    def remove(self) -> None:
        """Undo every change. Calling it again does nothing."""
        if self._active:
            self._active = False
            self._stack.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Attachable:
    """Base of everything that attaches to a foreign model. Subclasses implement `_attach`."""

    def _attach(self, model: Any, handle: Handle) -> None:
        """Change `model`, registering every change on `handle`."""
        raise TypeError(f"{type(self).__name__} does not define _attach(model, handle)")

    def _targets(self) -> weakref.WeakKeyDictionary[Any, Handle]:
        if "_attached_to" not in vars(self):
            self._attached_to: weakref.WeakKeyDictionary[Any, Handle] = weakref.WeakKeyDictionary()
        return self._attached_to

    def attach(self, model: Any) -> Handle:
        """Change `model` until `handle.remove()` is called.

        Raises:
            InvalidInputError: if this object is attached to the same model already.
        """
        targets = self._targets()
        if model in targets:
            raise InvalidInputError(
                f"this {type(self).__name__} is attached to this {type(model).__name__} already; remove the first "
                "handle, or make a second object for a second set of changes"
            )
        handle = Handle()
        handle.undo_with(targets.pop, model, None)
        try:
            self._attach(model, handle)
        except BaseException:
            handle.remove()
            raise
        targets[model] = handle
        return handle

    @contextmanager
    def attached(self, model: Any) -> Iterator[Any]:
        """Change `model` inside a `with` block; yields this object."""
        handle = self.attach(model)
        try:
            yield self
        finally:
            handle.remove()
