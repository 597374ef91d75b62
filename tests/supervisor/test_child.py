"""A single generation, without a supervisor around it: pinned imports and what it says of itself."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from supervisor import ends, launch, verify
from supervisor.blobs import BlobStore
from supervisor.child import attest, frames, program
from supervisor.child.codeprint import codeprint, every
from supervisor.launch import Child, LaunchRequest
from supervisor.manifest import Manifest, Tree, scan
from supervisor.settings import Target

DEADLINE_MILLISECONDS = 15_000


def prints_of(manifest: Manifest) -> dict[str, dict[str, str]]:
    """What the supervisor takes from the sources themselves."""
    prints = {}
    for path, digest in manifest.sources.items():
        code = compile(Path(manifest.absolute(path)).read_bytes(), "<any>", "exec", dont_inherit=True)
        prints[digest] = {codeprint(part): part.co_qualname for part in every(code)}
    return prints


class Generation:
    """A launched child, and its frames as they come."""

    def __init__(self, tree: Path, target: Target, state: Path, environment: Mapping[str, str]) -> None:
        blobs = BlobStore(state)
        self.manifest: Manifest = scan(Tree((str(tree),)), None, blobs.put).manifest
        request = LaunchRequest(
            generation=1,
            tree=self.manifest.digest,
            manifest=blobs.put_manifest(self.manifest),
            blobs=blobs.blobs,
            target=target,
            environment=os.environ | dict(environment),
        )
        self.child: Child = launch.launch(request)
        self._frames: list[dict[str, Any]] = []
        self._prints = prints_of(self.manifest)

    def verdict(self) -> verify.Verdict:
        """Ask once more and compare with the sources."""
        return verify.compare(self.manifest, self.manifest, self.attest(), self._prints)

    def frame(self, kind: str) -> dict[str, Any]:
        """Wait for the next frame of a kind."""
        poll = select.poll()
        poll.register(self.child.channel, select.POLLIN)
        while True:
            for frame in self._frames:
                if frame["type"] == kind:
                    self._frames.remove(frame)
                    return frame
            assert poll.poll(DEADLINE_MILLISECONDS), f"no frame {kind}"
            self._frames += self.child.receive()

    def go(self) -> None:
        self.frame("imported")
        self.child.send({"type": "go"})

    def attest(self, nonce: str = "n") -> verify.Attestation:
        self.child.send({"type": "attest", "nonce": nonce})
        return verify.parse(self.frame("attestation"))


@pytest.fixture
def generation(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Generation]]:
    """Launch ``tree/main.py``, or what else is given."""
    started: list[Generation] = []
    monkeypatch.chdir(tree)

    def start(target: Target | None = None, folder: Path = tree, **environment: str) -> Generation:
        chosen = target or Target("script", "main.py")
        started.append(Generation(folder, chosen, tmp_path / "state", environment))
        return started[-1]

    yield start
    for one in started:
        one.child.kill_group()
        launch.reap(one.child)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A pipe that the application waits on, and one that it answers on."""
    os.mkfifo(tmp_path / "step")
    os.mkfifo(tmp_path / "said")
    return tmp_path


STEPPED = """\
import json, os, sys, traceback
import first

def say(value):
    with open(os.environ["WA_STEP"] + "/said", "w") as pipe:
        json.dump(value, pipe)

while True:
    with open(os.environ["WA_STEP"] + "/step") as pipe:
        code = pipe.read()
    result = {}
    try:
        exec(code, {"result": result})
    except BaseException as error:
        result["error"] = repr(error)
        result["traceback"] = "".join(traceback.format_exception(error))
    say(result)
"""


def tell(fifo: Path, code: str) -> dict[str, Any]:
    """Have the application run ``code`` and return what it put into ``result``."""
    (fifo / "step").write_text(code, encoding="utf-8")
    answer: dict[str, Any] = json.loads((fifo / "said").read_text(encoding="utf-8"))
    return answer


@pytest.fixture
def stepped(tree: Path, fifo: Path, generation: Callable[..., Generation]) -> Generation:
    """A running script that does what :func:`tell` tells it."""
    (tree / "main.py").write_text(STEPPED, encoding="utf-8")
    (tree / "first.py").write_text("VALUE = 1\n", encoding="utf-8")
    (tree / "later.py").write_text(
        "VALUE = 'pinned'\ndef fail():\n    return 1 / 0  # pinned line\n", encoding="utf-8"
    )
    (tree / "pack").mkdir()
    (tree / "pack" / "__init__.py").touch()
    (tree / "pack" / "inner.py").write_text("from . import other\nVALUE = other.VALUE\n", encoding="utf-8")
    (tree / "pack" / "other.py").write_text("VALUE = 'other'\n", encoding="utf-8")
    (tree / "pack" / "data.txt").write_text("data", encoding="utf-8")
    (tree / "space" / "deep").mkdir(parents=True)
    (tree / "space" / "deep" / "leaf.py").write_text("VALUE = 'leaf'\n", encoding="utf-8")
    (tree / "shapes.py").write_text(MANY_SHAPES, encoding="utf-8")
    one = generation(WA_STEP=str(fifo))
    one.go()
    return one


def test_printed_line_is_out_before_the_process_ends(
    tree: Path,
    fifo: Path,
    generation: Callable[..., Generation],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (tree / "main.py").write_text(
        "import os, signal\nprint('printed')\nopen(os.environ['WA_STEP'] + '/said', 'w').close()\n"
        "signal.pause()\n",
        encoding="utf-8",
    )
    generation(WA_STEP=str(fifo)).go()
    (fifo / "said").read_bytes()
    assert capfd.readouterr().out == "printed\n"


@pytest.mark.parametrize("how", ["changed", "broken", "deleted"])
def test_lazy_import_gets_the_pinned_version(stepped: Generation, tree: Path, fifo: Path, how: str) -> None:
    later = tree / "later.py"
    if how == "deleted":
        later.unlink()
    else:
        later.write_text("VALUE = 'new'\n" if how == "changed" else "VALUE = =\n", encoding="utf-8")
    assert tell(fifo, "import later; result['value'] = later.VALUE") == {"value": "pinned"}
    executed = {module.name: module.sha256 for module in stepped.attest().modules}
    assert executed["later"] == stepped.manifest.sources["later.py"]


def test_file_made_after_the_start_is_not_part_of_the_generation(
    stepped: Generation, tree: Path, fifo: Path
) -> None:
    (tree / "newer.py").write_text("VALUE = 1\n", encoding="utf-8")
    assert "No module named 'newer'" in tell(fifo, "import newer")["error"]
    assert stepped.attest().modules


def test_traceback_and_inspect_show_the_pinned_source(stepped: Generation, tree: Path, fifo: Path) -> None:
    tell(fifo, "import later")
    (tree / "later.py").write_text("# another\n# text\n# stands here\n", encoding="utf-8")
    assert "# pinned line" in tell(fifo, "import later; later.fail()")["traceback"]
    assert (
        "# pinned line"
        in tell(fifo, "import inspect, later; result['x'] = inspect.getsource(later.fail)")["x"]
    )
    assert stepped.attest("again").nonce == "again"


def test_packages_namespaces_resources_and_reload_work(stepped: Generation, fifo: Path) -> None:
    code = """
import importlib, importlib.resources, pkgutil, pickle, sys
import pack.inner, space.deep.leaf
result["inner"] = pack.inner.VALUE
result["leaf"] = space.deep.leaf.VALUE
result["data"] = importlib.resources.files("pack").joinpath("data.txt").read_text()
result["listed"] = [m.name for m in pkgutil.iter_modules(pack.__path__)]
result["again"] = importlib.reload(pack.other).VALUE
result["file"] = pack.inner.__file__.endswith("pack/inner.py")
"""
    assert tell(fifo, code) == {
        "inner": "other", "leaf": "leaf",
        "data": "data", "listed": ["inner", "other"], "again": "other", "file": True,
    }  # fmt: skip
    assert not [module for module in stepped.attest().modules if module.sha256 is None]


def test_module_loaded_around_the_pins_is_reported(stepped: Generation, tree: Path, fifo: Path) -> None:
    (tree / "planted.py").write_text("VALUE = 1\n", encoding="utf-8")
    tell(
        fifo,
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('planted', {str(tree / 'planted.py')!r})\n"
        "sys.modules['planted'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)",
    )
    attestation = stepped.attest()
    assert [(module.name, module.sha256) for module in attestation.modules if module.sha256 is None] == [
        ("planted", None)
    ]
    verdict = verify.compare(stepped.manifest, stepped.manifest, attestation, {})
    assert verdict.problem == "module planted (planted.py) was loaded around the pinned imports"


def test_module_that_is_being_imported_or_has_two_names_is_no_alarm(stepped: Generation, fifo: Path) -> None:
    code = """
import sys, threading, later
sys.modules["second_name"] = later
entered, leave = threading.Event(), threading.Event()
sys.modules["__main__"].leave = leave
import builtins
real_compile = builtins.compile
def slow_compile(*args, **kwargs):
    entered.set()
    leave.wait()
    return real_compile(*args, **kwargs)
builtins.compile = slow_compile
threading.Thread(target=lambda: __import__("pack.inner"), daemon=True).start()
entered.wait()
result["in hand"] = "pack" in sys.modules
"""
    assert tell(fifo, code) == {"in hand": True}
    assert not [module for module in stepped.attest().modules if module.sha256 is None]
    tell(fifo, "import sys; sys.modules['__main__'].leave.set()")


def test_stale_and_planted_bytecode_is_never_read(
    tree: Path, fifo: Path, generation: Callable[..., Generation]
) -> None:
    import py_compile  # noqa: PLC0415

    (tree / "main.py").write_text(STEPPED, encoding="utf-8")
    first = tree / "first.py"
    first.write_text("VALUE = 'old'\n", encoding="utf-8")
    py_compile.compile(str(first), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    first.write_text("VALUE = 'new'\n", encoding="utf-8")
    one = generation(WA_STEP=str(fifo))
    one.go()
    assert tell(fifo, "import first; result['value'] = first.VALUE") == {"value": "new"}


def test_damaged_blob_is_not_executed(stepped: Generation, tmp_path: Path, fifo: Path) -> None:
    blob = tmp_path / "state" / "blobs" / stepped.manifest.sources["later.py"]
    blob.write_bytes(b"VALUE = 'tampered'\n")
    assert "pinned source of later.py is damaged" in tell(fifo, "import later")["error"]


def test_application_sees_nothing_of_us(stepped: Generation, fifo: Path) -> None:
    code = """
import os, sys, threading
names = {name.partition(".")[0] for name in sys.modules}
result["names"] = sorted(n for n in names if "supervisor" in n or n in {"child", "bootstrap", "program"})
result["threads"] = [thread.name for thread in threading.enumerate()]
result["main"] = sys.modules["__main__"].__name__
import signal
result["fatal"] = [s.name for s in (signal.SIGABRT, signal.SIGSEGV) if signal.getsignal(s) != signal.SIG_DFL]
numbers = [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2]
numbers = [fd for fd in numbers if os.path.exists(f"/proc/self/fd/{fd}")]
result["inherited"] = [fd for fd in numbers if os.get_inheritable(fd)]
"""
    assert tell(fifo, code) == {
        "names": ["_wa_supervisor_child"],
        "threads": ["MainThread"],
        "main": "__main__",
        "fatal": [],
        "inherited": [],
    }
    assert stepped.child.pid == os.getsid(stepped.child.pid) == os.getpgid(stepped.child.pid)


def test_error_of_the_application_reaches_us_with_its_text_and_not_our_frames(
    tree: Path, generation: Callable[..., Generation], capfd: pytest.CaptureFixture[str]
) -> None:
    (tree / "main.py").write_text(
        "def work():\n    raise RuntimeError('out of tape')\nwork()\n", encoding="utf-8"
    )
    one = generation()
    one.go()
    failed = one.frame("failed")
    assert (failed["error"], failed["importing"]) == ("RuntimeError: out of tape", False)
    os.waitid(os.P_PID, one.child.pid, os.WEXITED | os.WNOWAIT)
    printed = capfd.readouterr().err
    assert printed.startswith(f'Traceback (most recent call last):\n  File "{tree / "main.py"}", line 3')


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("", "exit status 0"),
        ("import sys; sys.exit(7)", "exit status 7"),
        ("import os; os.abort()", "signal SIGABRT"),
    ],
)
def test_exit_status_is_the_applications(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, how: str
) -> None:
    monkeypatch.chdir(tree)
    (tree / "main.py").write_text(body, encoding="utf-8")
    one = Generation(tree, Target("script", "main.py"), tmp_path / "state", {})
    one.go()
    os.waitid(os.P_PID, one.child.pid, os.WEXITED | os.WNOWAIT)
    assert one.child.ended
    assert str(ends.end_of(launch.reap(one.child))) == how


def test_package_watched_by_its_own_folder_is_pinned(
    tmp_path: Path,
    fifo: Path,
    generation: Callable[..., Generation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = tmp_path / "work" / "service"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 1\n", encoding="utf-8")
    (package / "entry.py").write_text(
        STEPPED.replace("import first", "import service") + "\n", encoding="utf-8"
    )
    monkeypatch.chdir(package.parent)
    one = generation(Target("module", "service.entry"), package, WA_STEP=str(fifo))
    one.go()
    assert tell(fifo, "import pkgutil; result['names'] = [m.name for m in pkgutil.iter_modules(['.'])]") == {
        "names": ["service"]
    }
    assert {module.name for module in one.attest().modules} == {"service", "__main__"}
    assert all(module.sha256 for module in one.attest().modules)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (b"", 0),
        (b"import a\nx = 1\n", 1),
        (b"try:\n    import a\nexcept ImportError:\n    from b import (\n        c,\n    )\nrun()\n", 6),
        (b"def f():\n    import late\nclass C:\n    import late\nif x:\n    import y\n", 6),
    ],
)
def test_last_import_line(source: bytes, line: int) -> None:
    assert attest.last_import_line(source) == line


MANY_SHAPES = """
import asyncio, contextlib, dataclasses, enum, functools, types, typing
import prometheus_client, psycopg

def plain(a, b=1, *c, d=2, **e): return [x for x in (a, b)], {y: 1 for y in c}, (lambda z: z)(d)
def outer():
    count = 0
    def inner():
        nonlocal count
        count += 1
        return count
    return inner
closure = outer()
def decorate(function):
    @functools.wraps(function)
    def wrapper(*args): return function(*args)
    return wrapper
@decorate
def decorated(): return "x"
@functools.lru_cache
def cached(n): return n
@contextlib.contextmanager
def managed(): yield 1
def generator(): yield from range(3)
async def coroutine(): await asyncio.sleep(0)
async def stream(): yield 1
@types.coroutine
def old_style(): yield
partial = functools.partial(plain, 1)
@dataclasses.dataclass(frozen=True, order=True)
class Data:
    x: int = 1
    def method(self): return self.x
class Named(typing.NamedTuple):
    x: int = 1
    def method(self): return self.x
class Colour(enum.Enum):
    RED = 1
    def shade(self): return self.value
def make():
    class Local:
        def method(self): return super().__repr__()
        @property
        def prop(self): return 1
        @prop.setter
        def prop(self, value): pass
        @staticmethod
        def static(): return 1.0, 1, True, -0.0, 1j, frozenset({1, "a"}), b"b", ..., None
        @classmethod
        def clsm(cls): return cls
        @functools.cached_property
        def lazy(self): return 2
    return Local
Local = make()
instance = Local()
class Meta(type):
    def __call__(cls, *args): return super().__call__(*args)
class Made(metaclass=Meta):
    partial = functools.partialmethod(lambda self, x: x, 1)
for _ in range(50):
    plain(1); closure(); decorated(); cached(1); list(generator()); asyncio.run(coroutine())
"""


def test_shapes_of_ordinary_programs_are_no_alarm(stepped: Generation, fifo: Path) -> None:
    assert tell(fifo, "import shapes, gc; gc.collect(); gc.freeze()") == {}
    for _ in range(3):
        verdict = stepped.verdict()
        assert verdict.problem is None
        assert verdict.functions_checked >= 20
        assert tell(fifo, "import shapes; shapes.plain(1); shapes.Local().lazy; shapes.instance.prop") == {}


ELSEWHERE = """
import shapes
space = {}
exec("def other(*args): return 'patched'", space)
other = space["other"]
"""


@pytest.mark.parametrize(
    ("tampering", "foreign"),
    [
        ("shapes.plain = other", "shapes:plain"),
        ("shapes.plain = lambda: 0", "shapes:plain"),
        ("shapes.plain.__code__ = other.__code__", "shapes:plain"),
        ("shapes.Data.method = other", "shapes:Data.method"),
        ("shapes.Local.static = staticmethod(other)", "shapes:Local.static"),
        ("shapes.Local.prop = property(other)", "shapes:Local.prop.fget"),
        ("import functools; shapes.partial = functools.partial(other)", "shapes:partial"),
        (
            "code = compile('def plain(a): return 1', shapes.__file__, 'exec'); exec(code, vars(shapes))",
            "shapes:plain",
        ),
        (
            "code = compile('def unheard_of(): return 1', shapes.__file__, 'exec'); exec(code, vars(shapes))",
            "shapes:unheard_of",
        ),
    ],
)
def test_tampered_function_is_named(stepped: Generation, fifo: Path, tampering: str, foreign: str) -> None:
    assert tell(fifo, "import shapes") == {}
    assert stepped.verdict().problem is None
    assert tell(fifo, ELSEWHERE + tampering) == {}
    verdict = stepped.verdict()
    assert set(verdict.foreign) | {"shapes:partial"} == {foreign, "shapes:partial"}  # Which wraps `plain`.
    assert foreign in verdict.foreign
    assert not verdict.attested
    assert verdict.problem == f"function {verdict.foreign[0]} does not run the code of its source"


@pytest.mark.parametrize("linked", ["folder", "file"])
def test_code_that_names_its_file_by_a_link_is_compared(
    stepped: Generation, tree: Path, fifo: Path, linked: str
) -> None:
    link = fifo / "linked.py"
    link.symlink_to(tree if linked == "folder" else tree / "shapes.py")
    name = link / "shapes.py" if linked == "folder" else link
    code = f"import shapes\nexec(compile('def unheard_of(): return 1', {str(name)!r}, 'exec'), vars(shapes))"
    assert tell(fifo, code) == {}
    assert stepped.verdict().foreign == ("shapes:unheard_of",)


def test_prints_tell_constants_apart_and_forget_places() -> None:
    def print_of(source: str) -> str:
        return codeprint(compile(source, "<x>", "exec"))

    different = [
        "x = 1",
        "x = 1.0",
        "x = True",
        "x = '1'",
        "x = b'1'",
        "x = (1,)",
        "x = 1j",
        "x = -0.0",
        "x = 0.0",
    ]
    assert len({print_of(source) for source in different}) == len(different)
    assert print_of("\n\nx = 1") == print_of("x = 1") == codeprint(compile("x=1", "elsewhere", "exec"))
    assert print_of("def f(): return {1, 2} == x in {'a', 'b'}") == print_of(
        "def f():\n  return {1, 2} == x in {'a', 'b'}"
    )


def test_main_under_a_second_name_is_no_alarm(stepped: Generation, fifo: Path) -> None:
    assert tell(fifo, "import multiprocessing, sys; result['alias'] = '__mp_main__' in sys.modules") == {
        "alias": True
    }
    assert stepped.verdict().problem is None


def test_name_given_to_another_module_of_the_tree_is_an_alarm(
    stepped: Generation, tree: Path, fifo: Path
) -> None:
    (tree / "planted.py").write_text("VALUE = 1\n", encoding="utf-8")
    code = (
        "import importlib.util, sys, later\n"
        f"spec = importlib.util.spec_from_file_location('later', {str(tree / 'planted.py')!r})\n"
        "sys.modules['later'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)"
    )
    assert tell(fifo, code) == {}
    assert stepped.verdict().problem == "module later (planted.py) was loaded around the pinned imports"


@pytest.mark.parametrize("registered", [True, False])
def test_plugin_loaded_by_its_path_is_pinned(
    stepped: Generation, tree: Path, fifo: Path, *, registered: bool
) -> None:
    (tree / "later.py").write_text("VALUE = 'new'\n", encoding="utf-8")
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('plugin', 'later.py')\n"
        "module = importlib.util.module_from_spec(spec)\n"
        f"if {registered}: sys.modules['plugin'] = module\n"
        "spec.loader.exec_module(module); result['value'] = module.VALUE"
    )
    assert tell(fifo, code) == {"value": "pinned"}
    assert "later.py" in {module.path for module in stepped.attest().modules if module.sha256}


@pytest.mark.usefixtures("unmeasured")
def test_modules_named_like_the_standard_library_are_those_of_the_tree(
    tree: Path,
    generation: Callable[..., Generation],
    capfd: pytest.CaptureFixture[str],
) -> None:
    names = ["json", "ast", "struct", "traceback", "hashlib", "linecache", "select", "faulthandler"]
    for name in names:
        (tree / f"{name}.py").write_text("MINE = True\n", encoding="utf-8")
    imports = ", ".join(names)
    (tree / "main.py").write_text(
        f"import {imports}\nprint([hasattr(m, 'MINE') for m in ({imports})], flush=True)\n", encoding="utf-8"
    )
    plain = subprocess.run([sys.executable, "main.py"], cwd=tree, capture_output=True, text=True, check=True)
    one = generation()
    one.go()
    os.waitid(os.P_PID, one.child.pid, os.WEXITED | os.WNOWAIT)
    assert capfd.readouterr().out == plain.stdout
    assert plain.stdout.startswith("[True, "), "void: plain Python was expected to prefer the tree's json"


def test_forked_process_of_the_application_does_not_speak_for_it(stepped: Generation, fifo: Path) -> None:
    code = """
import os, sys, prometheus_client
counter = prometheus_client.Counter("jobs", "Jobs.")
counter.inc(100)
pid = os.fork()
if pid == 0:
    counter.inc(900)
    sys.modules["__main__"].say = lambda _: sys.exit(0)  # Through our frames, as the application.
else:
    result["status"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
    assert tell(fifo, code)["status"] == 0
    families = {family["name"]: family for family in stepped.frame("metrics")["families"]}
    values = [value for name, _, value in families["jobs"]["samples"] if name == "jobs_total"]
    assert values == [100.0]
    assert stepped.verdict().problem is None


def test_application_that_closes_every_descriptor_goes_on(stepped: Generation, fifo: Path) -> None:
    assert tell(fifo, "import os; os.closerange(3, 256)") == {}
    with pytest.raises(EOFError):
        stepped.frame("metrics")
    assert tell(fifo, "result['alive'] = True") == {"alive": True}
    assert not stepped.child.ended


SPAWNING = """\
import concurrent.futures, multiprocessing, sys
import work

MINE = "old"

def versions(thing):
    import late
    import json
    return [MINE, work.VALUE, late.VALUE, type(thing).__module__, hasattr(json, "MINE")]

def nested(method, thing):
    return in_a_process(method, thing)

def in_a_process(method, thing, function=versions, *arguments):
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments, thing).result()

if __name__ == "__main__":
    print("imported", flush=True)
    open(sys.argv[1]).close()  # Wait.
    print(in_a_process("spawn", work.Thing()), flush=True)
    print(in_a_process("forkserver", work.Thing()), flush=True)
    print(in_a_process("spawn", work.Thing(), nested, "spawn"), flush=True)
"""


@pytest.mark.usefixtures("unmeasured")
def test_spawned_workers_import_what_their_generation_was_started_from(
    tree: Path, generation: Callable[..., Generation], capfd: pytest.CaptureFixture[str]
) -> None:
    sources = {
        "main.py": SPAWNING,
        "work.py": "VALUE = 'old'\nclass Thing: pass\n",
        "late.py": "VALUE = 'old'\n",
        "json.py": "MINE = True\n",
    }
    for name, text in sources.items():
        (tree / name).write_text(text, encoding="utf-8")
    for name in ("go", "go too"):
        os.mkfifo(tree / name)
    one = generation(Target("script", "main.py", ("go",)), PYTHONPATH=str(tree))
    one.go()
    plain = subprocess.Popen(
        [sys.executable, "main.py", "go too"], cwd=tree, stdout=subprocess.PIPE, text=True
    )
    assert plain.stdout is not None
    assert plain.stdout.readline() == "imported\n"
    for name, text in sources.items():
        (tree / name).write_text(text.replace("old", "new"), encoding="utf-8")
    for name in ("go", "go too"):
        (tree / name).write_bytes(b"")
    control, _ = plain.communicate()
    os.waitid(os.P_PID, one.child.pid, os.WEXITED | os.WNOWAIT)
    assert "'new'" in control, "void: plain Python was expected to mix versions"
    assert capfd.readouterr().out.splitlines() == [
        "imported",
        *["['old', 'old', 'old', 'work', True]"] * 3,
    ]


def test_spawning_is_not_made_ready_for_an_application_that_does_not_spawn(
    unmeasured: None, stepped: Generation, fifo: Path
) -> None:
    del unmeasured  # Before the process that it is about.
    code = "import sys; result['loaded'] = [name for name in sys.modules if 'multiprocessing' in name]"
    assert tell(fifo, code) == {"loaded": []}
    assert stepped.verdict().problem is None


def test_source_run_by_its_path_is_pinned(stepped: Generation, tree: Path, fifo: Path) -> None:
    (tree / "later.py").write_text("VALUE = 'new'\n", encoding="utf-8")
    assert tell(fifo, "import runpy; result['value'] = runpy.run_path('later.py')['VALUE']") == {
        "value": "pinned"
    }
    assert "later.py" in {module.path for module in stepped.attest().modules if module.sha256}


HANGING = """\
import os, re, signal, threading, time

def stuck():
    open("hangs", "w").close(); {}

{}
threading.Thread(target=threading.Event().wait, name="another", daemon=True).start()
stuck()
"""


@pytest.fixture
def hanging(tree: Path, generation: Callable[..., Generation]) -> Callable[..., Child]:
    """Start a child that hangs, and return it when it is about to."""
    os.mkfifo(tree / "hangs")

    def start(how: str, before: str = "", **environment: str) -> Child:
        (tree / "main.py").write_text(HANGING.format(how, before), encoding="utf-8")
        one = generation(**environment)
        one.go()
        (tree / "hangs").read_bytes()
        return one.child

    return start


@pytest.mark.parametrize(
    "how",
    [
        "time.sleep(60)",
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "7 ** 10 ** 9",  # One long call that looks at no signal.
        "re.match('(a+)+$', 'a' * 60 + 'b')",
    ],
)
def test_child_that_hangs_says_where_and_ends(
    hanging: Callable[..., Child], capfd: pytest.CaptureFixture[str], how: str
) -> None:
    child = hanging(how)
    child.abort()
    ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    printed = capfd.readouterr().err
    assert ended is not None
    assert ended.si_status == signal.SIGABRT
    assert printed.startswith("Fatal Python error: Aborted\n")
    assert 'main.py", line 4 in stuck\n' in printed
    assert 'threading.py", line ' in printed  # All threads.


@pytest.mark.parametrize(
    "before",
    [
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGABRT])",
        "signal.signal(signal.SIGABRT, lambda *_: None)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_child_that_cannot_say_where_it_hangs_is_killed_all_the_same(
    hanging: Callable[..., Child], capfd: pytest.CaptureFixture[str], before: str
) -> None:
    stops = "SIGSTOP" in before
    child = hanging(before if stops else "7 ** 10 ** 9", "" if stops else before)
    if stops:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    child.abort()
    assert not child.ended
    look = ends.look(child.pid)
    assert look is not None
    assert look.stopped == stops
    child.kill_group()
    ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_status == signal.SIGKILL
    assert capfd.readouterr().err == ""


def test_fatal_signal_leaves_a_traceback(
    tree: Path, generation: Callable[..., Generation], capfd: pytest.CaptureFixture[str]
) -> None:
    (tree / "main.py").write_text("import os\nos.kill(os.getpid(), 11)\n", encoding="utf-8")
    one = generation()
    one.go()
    os.waitid(os.P_PID, one.child.pid, os.WEXITED | os.WNOWAIT)
    printed = capfd.readouterr().err
    assert printed.startswith("Fatal Python error: Segmentation fault\n")
    assert 'main.py", line 2 in <module>\n' in printed


def test_application_keeps_the_fault_handler_that_it_asked_for(
    hanging: Callable[..., Child], tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asks = "import faulthandler; log = open('dump', 'w'); faulthandler.enable(log, all_threads=False)"
    child = hanging("time.sleep(60)", asks)
    child.abort()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert "in stuck" in (tree / "dump").read_text(encoding="utf-8")
    assert capfd.readouterr().err == ""


def test_end_is_told_when_the_last_thread_of_the_application_has_ended(
    tree: Path, fifo: Path, generation: Callable[..., Generation]
) -> None:
    (tree / "main.py").write_text(
        "import os, threading\n"
        "def work():\n"
        "    threading.main_thread().join()\n"
        "    open(os.environ['WA_STEP'] + '/said', 'w').write('main has ended')\n"
        "    open(os.environ['WA_STEP'] + '/step').read()\n"
        "threading.Thread(target=work).start()\n",
        encoding="utf-8",
    )
    started = generation(WA_STEP=str(fifo))
    started.go()
    assert (fifo / "said").read_text(encoding="utf-8") == "main has ended"
    started.attest()
    assert not any(frame["type"] == "ended" for frame in started._frames)
    (fifo / "step").write_text("", encoding="utf-8")
    started.frame("ended")


# --- its metrics ------------------------------------------------------------------------------------------


class Told:
    """A lock that tells when somebody wants it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.wanted = threading.Semaphore(0)

    def acquire(self, timeout: float) -> bool:
        self.wanted.release()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


def test_report_that_was_begun_earlier_never_comes_after_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a program the last report is made beside that which is due: two threads, one counter."""
    collected, go_on = threading.Event(), threading.Event()
    counted = iter((1, 2))

    class Slow(Collector):
        def collect(self) -> Iterator[Metric]:
            value = next(counted)
            if value == 1:
                collected.set()
                assert go_on.wait(DEADLINE_MILLISECONDS / 1000)
            yield CounterMetricFamily("jobs", "Jobs.", value=value)

    application = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", application)
    application.register(Slow())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel, lock = program._Channel(theirs), Told()
        monkeypatch.setattr(channel, "_reporting", lock, raising=False)
        due, last = (threading.Thread(target=channel.send_metrics) for _ in range(2))
        due.start()
        assert collected.wait(DEADLINE_MILLISECONDS / 1000)
        last.start()
        for _ in (due, last):
            assert lock.wanted.acquire(timeout=DEADLINE_MILLISECONDS / 1000)
        go_on.set()
        due.join()
        last.join()
        theirs.shutdown(socket.SHUT_WR)
        decoder = frames.Decoder()
        received = [frame for data in iter(lambda: ours.recv(65536), b"") for frame in decoder.feed(data)]
    assert [frame["families"][0]["samples"][0][2] for frame in received] == [1, 2]


HANGS = """\
import threading
from prometheus_client import REGISTRY

asked = threading.Event()

class Hangs:
    def describe(self):
        return []

    def collect(self):
        asked.set()
        threading.Event().wait()

REGISTRY.register(Hangs())
asked.wait()
"""


def test_program_ends_although_a_collector_of_its_own_hangs(
    generation: Callable[..., Generation], tree: Path
) -> None:
    (tree / "main.py").write_text(HANGS, encoding="utf-8")
    child = generation()
    child.go()
    child.child.send({"type": "metrics"})
    child.frame("ended")


def test_child_that_sends_without_end_gives_way_after_each_frame() -> None:
    class Endless:
        """A socket in which there is always something more."""

        def __init__(self) -> None:
            self.asked_total = 0

        def recv(self, _: int) -> bytes:
            self.asked_total += 1
            assert self.asked_total < 10
            return frames.encode({"type": "metrics", "families": []})

    endless: Any = Endless()
    assert launch.Child(1, None, endless).receive() == [{"type": "metrics", "families": []}]
