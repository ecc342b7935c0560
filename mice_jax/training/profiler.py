"""Writes a profiler trace of some steps, for TensorBoard's profile page (XProf) and for Perfetto."""

from pathlib import Path
from typing import Any

import jax

from mice_jax.config_checks import profiled_steps


class ProfileWriter:
    """A writer of records that traces the steps between them.

    The trace of a step lasts from the record of the step before to its own. Saves and other work after a record
    therefore belong to the next step.
    """

    def __init__(self, steps: str, folder: Path, steps_done: int):
        """Starts the trace if the first step of this process is in it.

        Args:
          steps: The steps to trace, "FIRST:END" without END, as in `log.profile_steps`.
          folder: The folder of the trace; TensorBoard finds it below its own folder.
          steps_done: The number of steps that were done before this process started.
        """
        self._steps, self._folder = profiled_steps(steps), folder
        self._annotation: jax.profiler.StepTraceAnnotation | None = None
        self._is_tracing = False
        self._expect(steps_done + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Ends the trace of the record's step, and begins that of the next one."""
        self._end_step()
        self._expect(record["step"] + 1)

    def close(self) -> None:
        """Writes the trace if it has not ended, because the run ended before."""
        self._end_step()
        self._end_trace()

    def _expect(self, step: int) -> None:
        if step not in self._steps:
            self._end_trace()
            return
        if not self._is_tracing:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._is_tracing = True
        self._annotation = jax.profiler.StepTraceAnnotation("step", step_num=step)
        self._annotation.__enter__()

    def _end_step(self) -> None:
        if self._annotation:
            self._annotation.__exit__(None, None, None)
            self._annotation = None

    def _end_trace(self) -> None:
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
