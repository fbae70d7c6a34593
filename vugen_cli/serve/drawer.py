"""One thread that draws what many ask for: images that wait and are of one kind are drawn together."""

import math
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from vugen_cli.data.shapes import Shape
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Sampling
from vugen_cli.sampling.sampler import SAMPLE_BATCH, Kind, Sampler
from vugen_cli.vlm.prompts import Prompt

ILL = 60.0  # seconds that a server is not healthy after a batch that failed


class QueueFull(Exception):
    """Too many images wait.

    Attributes:
        seconds: after which there may be room.
    """

    def __init__(self, seconds: int):
        super().__init__(f"too many pictures wait to be drawn; try again in {seconds} s")
        self.seconds = seconds


class Stopping(Exception):
    """The server is about to end and takes no more work."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


class _NobodyWaits(Exception):
    """All who asked for a batch have left."""


@dataclass(eq=False)
class Job:
    """One image that somebody waits for.

    Attributes:
        seed, prompt, index: what its noise depends on.
        settings: how it is drawn.
        kind: of its prompt; see `Sampler.kind`.
        size: see `Sampler.grid`.
        future: its pixels, uint8 [3, H, W]; cancelled, it is not drawn.
        left: whoever waited has gone, perhaps when it was being drawn already.
        done: the part of its drawing that is done, 0 to 1.
    """

    seed: int
    prompt: Prompt
    index: int
    settings: Sampling
    kind: Kind
    size: Shape | None = None
    future: Future[Tensor] = field(default_factory=Future)
    left: bool = False
    done: float = 0.0

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.left = True
        self.future.cancel()

    def alike(self, other: "Job") -> bool:
        """Whether both can be in one batch."""
        return (self.kind, self.size, self.settings) == (other.kind, other.size, other.settings)


class Drawer:
    """Draws in a thread of its own; first come, first served, with whatever else is alike.

    Args:
        sampler: draws; used by no other thread from now on, but for reading prompts.
        batch: images drawn together at most.
        limit: images that may wait.
        drawn: called with the size of each batch and the seconds it took.

    Attributes:
        stopping: no more work is taken.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch: int = SAMPLE_BATCH,
        limit: int = 64,
        drawn: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self.sampler, self.batch, self.limit, self.drawn = sampler, batch, limit, drawn
        self.stopping, self._failed = False, -math.inf
        self._waiting: list[Job] = []
        self._drawing: list[Job] = []
        self._seconds = 1.0  # that an image took of late
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # prompts: a tokenizer may refuse two threads at once
        self._thread = threading.Thread(target=self._run, name="drawer", daemon=True)
        self._thread.start()

    def check(self, n: int) -> None:
        """See that n images more may wait now.

        Raises:
            QueueFull, Stopping: as `submit`.
        """
        with self._changed:
            if self.stopping:
                raise Stopping
            self._forget_who_left()
            if len(self._waiting) + n > self.limit:
                images = len(self._waiting) + len(self._drawing)
                raise QueueFull(min(60, max(1, math.ceil(images * self._seconds))))

    def submit(
        self, prompt: Prompt, n: int, seed: int, settings: Sampling, size: Shape | None = None
    ) -> list[Job]:
        """Queue images 0 to n - 1 of a prompt, of a size as `Sampler.grid` takes it.

        Raises:
            VugenError: the prompt is too long, or has pictures that the VLM does not read.
            QueueFull: so many cannot wait now.
            Stopping: nothing is taken any more.
        """
        with self._reading:
            kind = self.sampler.kind(prompt)
        jobs = [Job(seed, prompt, i, settings, kind, size) for i in range(n)]
        with self._changed:  # a lock that the same thread may take again
            self.check(n)
            self._waiting += jobs
            self._changed.notify()
        return jobs

    def ahead(self, job: Job) -> int:
        """Images that wait and came before this one."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else 0

    @property
    def waiting(self) -> int:
        """Images that wait."""
        with self._changed:
            self._forget_who_left()
            return len(self._waiting)

    def stop(self) -> None:
        """Take no more work; the thread ends when what was taken is done."""
        with self._changed:
            self.stopping = True
            self._changed.notify()

    def give_up(self) -> None:
        """Take no more work, and end those who wait by `Stopping`, even in the middle of a batch."""
        self.stop()
        with self._changed:
            for job in [*self._waiting, *self._drawing]:
                job.left = True
            for job in self._waiting:
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(Stopping())
            self._waiting = []

    @property
    def ended(self) -> bool:
        """All that was taken is done, and no more will be."""
        return not self._thread.is_alive()

    def _forget_who_left(self) -> None:
        self._waiting = [job for job in self._waiting if not job.future.cancelled()]

    def _run(self) -> None:
        while batch := self._next():
            self._draw(batch)
            self._drawing = []

    def _next(self) -> list[Job]:
        """The next batch, when there is one; none when the thread is to end."""
        with self._changed:
            while True:
                self._forget_who_left()
                if self._waiting:
                    like = [job for job in self._waiting if job.alike(self._waiting[0])][: self.batch]
                    self._waiting = [job for job in self._waiting if job not in like]
                    # Whoever leaves in this very moment is not drawn for; from here on one is.
                    if batch := [job for job in like if job.future.set_running_or_notify_cancel()]:
                        self._drawing = batch
                        return batch
                elif self.stopping:
                    return []
                else:
                    self._changed.wait()

    @property
    def healthy(self) -> bool:
        """Whether the last batch could be drawn, or has failed long enough ago for another to be tried.

        One that is told to be ill gets no more work from what stands before it, and could never say else.
        """
        return time.monotonic() - self._failed > ILL

    def _draw(self, batch: list[Job]) -> None:
        settings, calls, began = batch[0].settings, 0, time.monotonic()
        expected = settings.steps * (1 if settings.solver == "euler" else 2)

        def each_step() -> None:
            nonlocal calls
            if calls == 0:  # the prompts have been read
                self._reading.release()
            calls += 1
            if all(job.left for job in batch):
                raise _NobodyWaits
            for job in batch:
                job.done = (calls - 1) / expected

        self._reading.acquire()
        try:
            keys = [(job.seed, job.prompt, job.index) for job in batch]
            images = self.sampler.draw_together(keys, settings, each_step=each_step, size=batch[0].size)
        except _NobodyWaits:
            error: Exception = Stopping()
        except VugenError as problem:
            error = problem
        except Exception as problem:  # one batch that fails must not end the server
            traceback.print_exc()
            self._failed, error = time.monotonic(), problem
        else:
            self._failed, seconds = -math.inf, time.monotonic() - began
            self._seconds += (seconds / len(batch) - self._seconds) / 2
            self.drawn(len(batch), seconds)
            for job, image in zip(batch, images, strict=True):
                job.done = 1.0
                job.future.set_result(image)
            return
        finally:
            if calls == 0:
                self._reading.release()
        for job in batch:
            job.future.set_exception(error)
