"""Claims on the trials of a sweep: which worker runs which trial, as a table in the study's database.

A claim is taken, and taken over from a dead worker, by one conditional statement, so two workers never hold the same
trial.
"""

import os
import socket
import time
import uuid
from pathlib import Path

import sqlalchemy as sql
from sqlalchemy import exc as sql_exc

HEARTBEAT_S = 10.0  # time between two heartbeats of a worker
DEAD_AFTER_S = 60.0  # a worker of another machine counts as dead after so long without a heartbeat


class Claims:
    """The claims of one worker process on the trials of a study.

    Args:
        engine: connection to the study's database.
        study: name of the study.
    """

    def __init__(self, engine: sql.Engine, study: str):
        self._engine, self._study = engine, study
        self.owner = f"{socket.gethostname()}|{os.getpid()}|{process_start_time(os.getpid())}|{uuid.uuid4().hex}"
        # By trial: owner and heartbeat of a claim of another machine, and when this process first saw that heartbeat.
        self._last_seen: dict[int, tuple[str, int, float]] = {}
        self._metadata = sql.MetaData()
        self._table = sql.Table(
            "mice_claims",
            self._metadata,
            sql.Column("study", sql.String(255), primary_key=True),
            sql.Column("trial", sql.Integer, primary_key=True),
            sql.Column("owner", sql.String(255), nullable=False),
            sql.Column("beat", sql.Integer, nullable=False),
        )

    def create_table(self) -> None:
        """Creates the table where it does not exist."""
        self._metadata.create_all(self._engine)

    def take(self, number: int) -> bool:
        """Claims a trial that nobody holds, or whose holder is dead; returns whether it succeeded."""
        t = self._table
        of_trial = sql.and_(t.c.study == self._study, t.c.trial == number)
        with self._engine.begin() as db:
            row = db.execute(sql.select(t.c.owner, t.c.beat).where(of_trial)).first()
        if row is None:
            return self._insert(number)
        if not self._is_dead(number, row.owner, row.beat):
            return False
        unchanged = sql.and_(of_trial, t.c.owner == row.owner, t.c.beat == row.beat)
        with self._engine.begin() as db:
            return db.execute(sql.update(t).where(unchanged).values(owner=self.owner, beat=0)).rowcount == 1

    def _insert(self, number: int) -> bool:
        row = sql.insert(self._table).values(study=self._study, trial=number, owner=self.owner, beat=0)
        try:
            with self._engine.begin() as db:
                db.execute(row)
        except sql_exc.IntegrityError:
            return False
        return True

    def held(self, number: int) -> bool:
        """Returns whether some worker, dead or alive, has claimed a trial."""
        t = self._table
        of_trial = sql.and_(t.c.study == self._study, t.c.trial == number)
        with self._engine.begin() as db:
            return db.execute(sql.select(t.c.owner).where(of_trial)).first() is not None

    def release(self, number: int) -> None:
        """Gives up a claim of this worker."""
        with self._engine.begin() as db:
            db.execute(sql.delete(self._table).where(self._is_mine(number)))

    def renew(self, number: int) -> bool:
        """Writes a heartbeat; returns false if another worker has taken the claim over."""
        t = self._table
        with self._engine.begin() as db:
            return db.execute(sql.update(t).where(self._is_mine(number)).values(beat=t.c.beat + 1)).rowcount == 1

    def _is_mine(self, number: int) -> sql.ColumnElement[bool]:
        t = self._table
        return sql.and_(t.c.study == self._study, t.c.trial == number, t.c.owner == self.owner)

    def _is_dead(self, number: int, owner: str, beat: int) -> bool:
        host, process, start_time, _ = owner.split("|")
        if host == socket.gethostname():
            return process_start_time(int(process)) != start_time
        # The clocks of two machines may differ, so only whether the heartbeat changes counts.
        seen = self._last_seen.get(number)
        if seen is None or seen[:2] != (owner, beat):
            self._last_seen[number] = (owner, beat, time.monotonic())
            return False
        return time.monotonic() - seen[2] > DEAD_AFTER_S


def process_start_time(process: int) -> str:
    """Returns when a process of this machine started, in clock ticks; "" if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
