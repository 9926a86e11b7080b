"""What holds a model while it is under way: one reply, or a batch of them."""

from __future__ import annotations

import threading


class Work:
    """Something that goes step by step, suspended in between, in one thread at a time: `owner`."""

    owner: threading.Thread | None = None

    def stop(self) -> None:
        """Ends it with stop reason "interrupted"; callable from any thread, at any time."""
        raise NotImplementedError

    def finish(self, reason: str) -> None:
        """Marks it as ended for `reason`, unless it has ended already."""
        raise NotImplementedError

    @property
    def stopped(self) -> bool:
        """True when nothing further will come."""
        raise NotImplementedError

    @property
    def abandoned(self) -> bool:
        """Whether it will not be missed: ended, or left behind by its own thread."""
        owner = self.owner
        return (
            self.stopped
            or owner is None
            or owner is threading.current_thread()
            or not owner.is_alive()
        )
