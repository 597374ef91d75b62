"""No false alarms: what a program does to its own functions while it works changes nothing in the proof.

The shapes that functions have when a module is loaded are in test_child.py; here is what happens later.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from supervisor import control
from tests.supervisor.harness import Supervised

LATER_MODULES = 20
VERIFICATIONS = 40

MAIN = """\
import asyncio, dataclasses, signal, sys, threading, time
import prometheus_client, psycopg
sys.path.insert(0, "modules")
import work

ending, failures, rounds = threading.Event(), [], {}

def repeat(job):
    number = 0
    while not ending.is_set():
        try:
            job(number)
        except Exception as error:
            failures.append((job.__name__, error))
            return
        number += 1
        rounds[job.__name__] = number
        time.sleep(0.001)

signal.signal(signal.SIGTERM, lambda *_: ending.set())
threads = [threading.Thread(target=repeat, args=(job,)) for job in work.JOBS]
for thread in threads:
    thread.start()
while not failures and len(rounds) < len(threads):
    time.sleep(0.001)
print("working", flush=True)
repeat(work.rebind)
for thread in threads:
    thread.join()
print("failures:", failures, "most rounds:", max(rounds.values()), "in all:", len(rounds), flush=True)
"""

WORK = """\
import asyncio, collections, contextlib, copy, dataclasses, enum, functools, gc, importlib, sys, types, typing
import prometheus_client, psycopg.adapt

taken = prometheus_client.Histogram("taken", "Seconds.")
failed = prometheus_client.Counter("failed", "Failures.")
kept = collections.deque(maxlen=50)

def one(value, /, *, by=1): return value + by
def other(value, /, *, by=1): return value - by
chosen = one
cached = other

class Holder:
    act = one
    def method(self): return lambda: self
    @taken.time()
    @failed.count_exceptions()
    def measured(self): return 1

@functools.singledispatch
def dispatched(value): return "any"

def rebind(number):
    global chosen, cached
    chosen = (one, other)[number % 2]
    cached = functools.lru_cache((one, other)[number % 2])
    Holder.act = functools.partialmethod(chosen) if number % 3 else chosen
    Holder.added = classmethod(lambda cls: cls)
    one.__defaults__, one.__kwdefaults__, one.__doc__, one.mark = None, {"by": number}, "Said later.", number
    holder = Holder()
    holder.act = types.MethodType(lambda self: self, holder)
    kept.append((holder, holder.method(), holder.measured()))
    kept.append((functools.partial(chosen, number), cached(number)))
    dispatched.register(type(f"Kind{number % 5}", (), {}))(lambda value: number)

def make_classes(number):
    @dataclasses.dataclass(slots=True, order=True)
    class Row:
        name: str
        def label(self): return super().__repr__()
    class Pair(typing.NamedTuple):
        left: int
        def both(self): return self.left, self
    class Kind(enum.Flag):
        A = enum.auto()
        def shade(self): return self.name
    class Dumper(psycopg.adapt.Dumper):
        def dump(self, obj): return b"x"
    psycopg.adapters.register_dumper(Row, Dumper)
    kept.append((Row("a"), Pair(1).both, Kind.A.shade, collections.namedtuple("Point", "x y")(1, 2)))

def run_coroutines(number):
    @types.coroutine
    def old_style():
        yield
    async def stream():
        for step in range(3):
            await old_style()
            yield step
    async def together():
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(collect())
    async def collect(): return [step async for step in stream()]
    asyncio.run(together())

def suspend(number):
    def endless():
        while True:
            yield number
    @contextlib.contextmanager
    def managed():
        yield from endless()
    generator = endless()
    kept.append((generator, next(generator), managed, contextlib.ExitStack().callback(endless)))
    kept.append(types.FunctionType(one.__code__, globals(), "copied"))
    kept.append(copy.copy(endless))

def load(number):
    importlib.reload(importlib.import_module(f"later{number % LATER_MODULES}"))
    if number % LATER_MODULES == 0:
        for name in [name for name in sys.modules if name.startswith("later")]:
            del sys.modules[name]

def look_on(number):
    sys.setprofile(lambda frame, event, argument: None)
    one(number)
    sys.setprofile(None)
    if number % 10 == 0:
        gc.freeze()
    elif number % 10 == 5:
        gc.unfreeze()
        gc.collect()

JOBS = [make_classes, run_coroutines, suspend, load, look_on]
"""


def test_program_that_makes_and_rebinds_functions_while_it_works_is_no_alarm(
    supervise: Callable[..., Supervised], tree: Path
) -> None:
    (tree / "main.py").write_text(MAIN, encoding="utf-8")
    source = WORK.replace("LATER_MODULES", str(LATER_MODULES))
    (tree / "modules" / "work.py").write_text(source, encoding="utf-8")
    for number in range(LATER_MODULES):
        text = f"from work import one\ndef later(): return {number}, one(1), lambda: later\nlater()\n"
        (tree / "modules" / f"later{number}.py").write_text(text, encoding="utf-8")
    started = supervise("main.py", cwd=tree)
    started.expect("working")
    started.expect(r"reload \(start\): live")
    for _ in range(VERIFICATIONS):
        verified = control.request(started.runtime, "verify")["verify"]
        assert verified["functions"]["foreign"] == []
        assert verified["in_sync"]
        assert verified["functions"]["checked"] >= 10  # While frozen, what modules hold is still seen.
    assert started.status()["live"]["generation"] == 1
    started.process.terminate()
    done = started.expect(r"failures: \[\] most rounds: (\d+) in all: 6")
    assert int(done.group(1)) >= VERIFICATIONS
