"""`prep cache` on a Ray cluster: pictures decoded on every node, encoded by one actor per GPU, written by the actors.

`OnRay` is an engine of prep/cache.py. Units and leases are those of every run: the command itself plans, hands out and
counts; an actor that dies costs its unit, which another does again. Ray is loaded when there is something to encode.
"""

import importlib.util
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from families.checkpoints import fingerprint, locate
from prep.pixels import Picture, pixels_of
from prep.pool import Crash
from prep.units import Unit
from prep.writing import Part
from schemas.console import log
from schemas.errors import UserError
from schemas.project import Project
from schemas.stores import Store

_MOST_TRIES = 3  # of a unit whose actor dies, and of a node whose actors die before they are ready
_LOOK_S = 1.0  # between looks at the cluster while nothing comes back
_STAFF_S = 10.0  # between looks for nodes that joined
_PATIENCE_S = 30.0  # before it is told that no encoder has started yet
_SETTINGS: Mapping[str, str] = {  # of Ray, read when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns that this will be so
}
_THREADS = {"OPENCV_FOR_THREADS_NUM": "1", "VIPS_CONCURRENCY": "1"}  # there is a decoder for every core


class Encoder:
    """What an actor does: hold an encoder, encode units, write them to the store."""

    def __init__(self) -> None:
        """Load nothing yet: a fault of `start` reaches the command as it is."""
        self._encoder: Any = None
        self._node = ""

    def start(self, project: Project, kind: str, components: Sequence[str], weights: str, threads: int) -> None:
        """Load an encoder, which must be the one that the command has; `threads` of a CPU, or 0."""
        import ray  # noqa: PLC0415 - an extra
        import torch  # noqa: PLC0415 - the command itself loads no tensor library

        from prep import encode  # noqa: PLC0415 - it loads one

        self._node = ray.util.get_node_ip_address()
        if threads:
            torch.set_num_threads(threads)
        try:
            checkpoint = locate(project, components)
            if fingerprint(project, checkpoint, components, remember=False) != weights:
                raise UserError(f"{checkpoint}: other weights or settings than where the command runs; copy them there")
            self._encoder = getattr(encode, kind)(project, checkpoint)
        except UserError as fault:
            raise UserError(f"node {self._node}: {fault}") from None

    def work(self, unit: Unit, token: str, pixels: Sequence[Any]) -> Iterator[Part]:
        """Encode a unit; `pixels` are references to those of its pictures, none for prompts."""
        import ray  # noqa: PLC0415 - an extra

        if unit.store.read(token) is None:
            raise UserError(
                f"node {self._node}: {unit.store.where()} is another folder than where the command runs; "
                "all nodes need the workspace on a file system that they share, under the same path"
            )
        if pixels:
            ray.wait(list(pixels), num_returns=len(pixels), timeout=0)  # has those of other nodes sent here
        made = [map(_fetched, pixels)] if pixels else []
        try:
            for part in chain(self._encoder.work(unit, *made), self._encoder.settle()):  # noqa: UP028 - Ray sends values
                yield part
        except UserError as fault:
            raise UserError(f"node {self._node}: {fault}") from None


def _fetched(pixels: Any) -> Any:
    """Wait for the pixels of a picture; a decoder that keeps dying costs the picture."""
    import ray  # noqa: PLC0415 - an extra

    try:
        return ray.get(pixels)
    except ray.exceptions.RayTaskError:
        raise  # a bug
    except ray.exceptions.RayError as fault:
        return Crash(f"decoding it failed: {_first_line(fault)}", died=True)


@dataclass(slots=True)
class _Task:
    """A unit that was taken, and how far it is."""

    unit: Unit
    pixels: list[Any] = field(default_factory=list)  # references
    tries: int = 0
    done: set[str] = field(default_factory=set)  # keys that are on the disk


@dataclass(slots=True, eq=False)
class _Member:
    """An actor, where it is, and what it is at."""

    node: str
    actor: Any
    pending: Any  # a reference to its start, or the stream of its parts; None if it is free
    task: _Task | None = None


class OnRay:
    """Encoders on the nodes of a Ray cluster. Used as a context."""

    def __init__(self, project: Project, address: str | None = None) -> None:
        """`address` is by default RAY_ADDRESS, a cluster that runs on this machine, or one that is started here."""
        if importlib.util.find_spec("ray") is None:
            raise UserError("--engine ray needs Ray; run: pip install 'pairline[ray]'")
        if (address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
            raise UserError("ray:// is not supported; run the command on a node of the cluster, with --address auto")
        self._project, self._address = project, address
        self._open = ExitStack()  # holds the connection to the cluster, if it is ours
        self._members: list[_Member] = []
        self._since = self._staffed = 0.0  # when the first actors were asked for, and when it was looked last
        self._told = False  # that none has started yet
        self._faults: dict[str, int] = {}  # node -> actors in a row that died there before they were ready
        self._load: tuple[Any, ...] = ()  # arguments of an actor's start
        self._decode: Any = None  # `pixels_of` as a task
        self._tokens: dict[Store, str] = {}

    def __enter__(self) -> "OnRay":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self.release()
        self._open.close()

    def latents(self, checkpoint: Path, units: Iterator[Unit]) -> Iterator[Part]:
        """Encode units of pictures."""
        return self._encode("Latents", self._project.family.image_encoder, checkpoint, units)

    def texts(self, checkpoint: Path, units: Iterator[Unit]) -> Iterator[Part]:
        """Encode units of prompts."""
        return self._encode("Texts", self._project.family.text_encoders, checkpoint, units)

    def release(self) -> None:
        """End the actors; the connection to the cluster stays."""
        for member in self._members:
            _ray().kill(member.actor)
        for store, token in self._tokens.items():
            store.remove(token)
        self._members, self._tokens, self._faults, self._load = [], {}, {}, ()

    def used(self) -> None:
        """Say nothing of GPUs: they are the actors'."""

    def _encode(self, kind: str, components: Sequence[str], checkpoint: Path, units: Iterator[Unit]) -> Iterator[Part]:
        """Hand units to actors as they become free, their pictures decoded ahead: one unit ahead for each actor."""
        first = next(units, None)
        if first is None:
            return
        if not self._load:
            self._connect()
            self._since, self._decode = time.monotonic(), _ray().remote(num_cpus=1)(pixels_of)
            weights = fingerprint(self._project, checkpoint, components)
            self._load = (_ray().put(self._project), kind, tuple(components), weights)
        waiting, units = deque([self._prepared(_Task(first))]), iter(units)
        while waiting or any(member.task for member in self._members):
            self._staff()
            self._hand_out(waiting)
            while len(waiting) < len(self._members) and (unit := next(units, None)):
                waiting.append(self._prepared(_Task(unit)))
                self._hand_out(waiting)
            yield from self._listen(waiting)

    def _connect(self) -> None:
        _check_reachable(self._address or os.environ.get("RAY_ADDRESS", ""))
        ray = _ray()
        if ray.is_initialized():
            return
        try:
            ray.init(
                address=self._address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": _THREADS},
            )
        except (ConnectionError, TimeoutError, ValueError, RuntimeError) as fault:
            raise _no_cluster(self._address or "this machine", fault) from None
        # Whatever it is told, Ray prints on stdout that a process died; the closing report must be alone there.
        nothing = self._open.enter_context(Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - the stack closes it
        self._open.enter_context(redirect_stdout(nothing))
        self._open.callback(ray.shutdown)

    def _prepared(self, task: _Task) -> _Task:
        """Have the pictures of a unit decoded."""
        pictures = [item for item in task.unit.items if isinstance(item, Picture)]
        task.pixels = [self._decode.remote(picture) for picture in pictures]
        return task

    def _staff(self) -> None:
        """Start the actors that are missing: one per GPU, or one per node of a cluster that has none.

        On a CPU one encoder takes all cores by itself. An actor asks for no core: decoding could keep it from starting.
        """
        if self._members and time.monotonic() - self._staffed < _STAFF_S:
            return
        self._staffed = time.monotonic()
        nodes = [node for node in _ray().nodes() if node["Alive"]]
        gpus = any(node["Resources"].get("GPU") for node in nodes)
        for node in nodes:
            name, has = node["NodeID"], node["Resources"]
            wanted = int(has.get("GPU", 0)) if gpus else int(has.get("CPU", 0) >= 1)
            if self._faults.get(name, 0) < _MOST_TRIES:
                for _ in range(wanted - sum(member.node == name for member in self._members)):
                    self._hire(name, gpus, int(has.get("CPU", 1)))
        if not self._members:
            raise UserError("no node of the Ray cluster can encode: ray status shows what it has")

    def _hire(self, node: str, gpu: bool, cores: int) -> None:
        ray = _ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415 - an extra

        here = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        actor = ray.remote(Encoder).options(num_cpus=0, num_gpus=int(gpu), scheduling_strategy=here).remote()
        self._members.append(_Member(node, actor, actor.start.remote(*self._load, 0 if gpu else cores)))

    def _hand_out(self, waiting: deque[_Task]) -> None:
        for member in self._members:
            if member.pending is None and waiting:
                member.task = waiting.popleft()
                unit = member.task.unit
                encode = member.actor.work.options(num_returns="streaming")
                member.pending = encode.remote(unit, self._token(unit.store), member.task.pixels)

    def _token(self, store: Store) -> str:
        """Leave a file in a store for the actors to find: so they know that theirs is the same."""
        if store not in self._tokens:
            self._tokens[store] = token = f"tokens/{uuid4().hex}"
            store.create(token, b"")
        return self._tokens[store]

    def _listen(self, waiting: deque[_Task]) -> Iterator[Part]:
        """Yield the parts that have come; take in who is ready, and who is lost."""
        ray, at = _ray(), {id(member.pending): member for member in self._members if member.pending is not None}
        ready, _ = ray.wait([member.pending for member in at.values()], num_returns=1, timeout=_LOOK_S)
        for member in [at[id(one)] for one in ready]:
            try:
                if member.task is None:
                    ray.get(member.pending)
                    member.pending, self._faults[member.node] = None, 0
                else:
                    yield self._counted(member.task, ray.get(next(member.pending)))
            except StopIteration:
                member.task = member.pending = None
            except ray.exceptions.RayTaskError as fault:
                raise fault.cause if isinstance(fault.cause, UserError) else fault from None
            except ray.exceptions.RayError as fault:
                yield from self._lost(member, _first_line(fault), waiting)
        self._tell_of_waiting()

    def _counted(self, task: _Task, part: Part) -> Part:
        task.done.update(part.keys)
        return part

    def _lost(self, member: _Member, reason: str, waiting: deque[_Task]) -> Iterator[Part]:
        """Go on without an actor: what its unit still lacks is for another."""
        self._members.remove(member)
        self._staffed = 0.0
        _ray().kill(member.actor)  # it may be out of reach only
        task = member.task
        if task is None:
            self._faults[member.node] = faults = self._faults.get(member.node, 0) + 1
            if faults == _MOST_TRIES:
                log.warning("node %s is left out, its encoders die when they start: %s", member.node, reason)
            return
        task.tries += 1
        unit, last = task.unit, task.unit.items[-1]
        if task.tries == _MOST_TRIES:
            raise UserError(
                f"encoders died {_MOST_TRIES} times on the same {len(unit.items)} rows, from {_name(unit.items[0])} to "
                f"{_name(last)}: {reason}; smaller batches need less memory, and Ray's logs say more"
            )
        log.warning("an encoder was lost, another does its work: %s", reason)
        left = [place for place, key in enumerate(unit.keys) if key not in task.done]
        if left:
            keys, items = tuple(unit.keys[place] for place in left), tuple(unit.items[place] for place in left)
            rest = _Task(replace(unit, keys=keys, items=items), tries=task.tries)
            waiting.appendleft(self._prepared(rest))
        else:
            yield Part(unit.name, last=True)

    def _tell_of_waiting(self) -> None:
        late = time.monotonic() - self._since > _PATIENCE_S
        if late and not self._told and not any(member.task for member in self._members):
            log.info("waiting for the Ray cluster to start an encoder; ray status shows what it is busy with")
            self._told = True


def _check_reachable(address: str) -> None:
    """Raise UserError if nobody listens at host:port: Ray would wait a minute, then end the process by itself."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as fault:
            raise _no_cluster(address, fault) from None


def _no_cluster(address: str, fault: Exception) -> UserError:
    return UserError(f"no Ray cluster at {address}: {_first_line(fault)}; start one there with: ray start --head")


def _ray() -> Any:
    """Load Ray, its reports and warnings kept out of the output."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray  # noqa: PLC0415 - an extra, and slow to load

    return ray


def _name(item: Picture | str) -> str:
    return item.name if isinstance(item, Picture) else repr(item[:60])


def _first_line(fault: BaseException) -> str:
    return (str(fault) or type(fault).__name__).splitlines()[0].rstrip(".")
