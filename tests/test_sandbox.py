"""Python code that nobody trusts: what it can do to its machine, to its tests, and to its reward."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stagekit import sandbox, sandbox_child
from stagekit.errors import StageError
from stagekit.sandbox import Limits, Refused, cores, passed


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is one of Linux")

RIGHT = "def f(x):\n    return x + 1\n"
TESTS = ["assert f(1) == 2", "assert f(2) == 3", "assert f(2) == 4"]
PATIENT = Limits(cpu_seconds=2, wall_seconds=120)
"""For machines with other work: what ends a run that computes is its CPU time."""


@pytest.fixture(autouse=True)
def needs_namespaces() -> None:
    if sandbox.refused():
        pytest.skip(f"the kernel refuses a part of the sandbox here: {sandbox.refused()}")


def count(code: str, limits: Limits = PATIENT, tests: list[str] = TESTS) -> int:
    return passed([code], [tests], limits)[0]


def test_the_tests_that_hold_are_counted_in_the_order_of_the_codes() -> None:
    codes = [RIGHT, "def f(x):\n    return 2\n", "def g(x):\n    return 2\n", "def f(x:", "", RIGHT]
    assert passed(codes, [TESTS] * 6, PATIENT) == [2, 1, 0, 0, 0, 2]
    assert passed([], []) == []


def test_a_test_sees_the_names_of_the_code_and_leaves_nothing_for_the_next() -> None:
    assert count("a = 1", tests=["a = 5; assert a == 5", "assert a == 1", "assert __name__ == 'tests'"]) == 3


def test_the_standard_library_is_there_and_classes_of_the_code_pickle() -> None:
    code = (
        "import asyncio, collections, dataclasses, decimal, hashlib, multiprocessing, pickle, sqlite3, ssl, zoneinfo\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        f"assert pickle.loads(pickle.dumps(Point(1))) == Point(1)\n{RIGHT}"
    )
    assert count(code) == 2


def test_installed_packages_are_there_where_they_are_asked_for() -> None:
    code = f"import numpy\nassert numpy.ones((9, 9)) @ numpy.ones(9) is not None\n{RIGHT}"
    assert passed([code], [TESTS], Limits(10, 120, 2048, 16, 16), packages=True) == [2]
    assert count(code) == 0


def test_packages_below_tmp_are_there_beside_the_code_s_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir(mode=0o755)
    (installed / "only_here.py").write_text("two = 2\n")
    monkeypatch.syspath_prepend(installed)
    code = f"import only_here\nassert only_here.two == 2\nopen('/tmp/x', 'w').write('x')\n{RIGHT}"
    assert passed([code], [TESTS], Limits(10, 120, 2048, 16, 16), packages=True) == [2]
    code = f"import only_here\nopen(only_here.__file__, 'w')\n{RIGHT}"
    assert passed([code], [TESTS], Limits(10, 120, 2048, 16, 16), packages=True) == [0]


HARMLESS = {
    "what a script does": "if __name__ == '__main__':\n    raise SystemExit\n",
    "threads": "import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()\n",
    "files of its own": "open('/tmp/x', 'w').write('x')\nassert open('x').read() == 'x'\n",
    "a process that outlives it": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(10**6)\n",
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_the_code_may_do_does_not_keep_it_from_passing(what: str) -> None:
    assert count(HARMLESS[what] + RIGHT) == 2


EMPTY = """
import os
assert os.listdir('/tmp') == [] and os.getcwd() == '/tmp'
assert set(os.environ) <= {'PATH', 'HOME', 'LANG', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'}
assert not any(os.path.exists(path) for path in ('/proc', '/home', '/root/.ssh', '/etc/passwd', '/bin/sh', '/sys'))
assert os.getuid() != 0 and os.getpid() < 10
"""
READ_ONLY = """
import os, pathlib
for path in ('/x', '/lib/x', '/usr/lib/x', os.path.dirname(os.__file__) + '/x', os.__file__):
    try:
        pathlib.Path(path).write_text('')
    except OSError:
        continue
    raise AssertionError(path)
"""
WITHOUT_RIGHTS = """
import ctypes, os
kernel = ctypes.CDLL(None)
assert kernel.unshare(0x10000000) == -1 and kernel.unshare(0x40000000) == -1
assert kernel.mount(b'none', b'/tmp', b'tmpfs', 0, None) == -1 and kernel.umount2(b'/tmp', 2) == -1
try:
    os.setuid(0)
except OSError:
    pass
else:
    raise AssertionError
"""
WITHOUT_NETWORK = """
import socket
for address in (('127.0.0.1', 22), ('1.1.1.1', 80)):
    try:
        socket.create_connection(address, timeout=5)
    except OSError as error:
        assert error.errno in (99, 101), error  # no address, no network; not a refused connection
    else:
        raise AssertionError(address)
"""


@pytest.mark.parametrize(
    "held", [EMPTY, READ_ONLY, WITHOUT_RIGHTS, WITHOUT_NETWORK], ids=["empty", "read only", "no rights", "no network"]
)
def test_the_code_is_kept_apart_from_the_machine(held: str) -> None:
    assert count(held + RIGHT) == 2


HOSTILE = {
    "an infinite loop": "while True: pass",
    "a loop in the tested function": "def f(x):\n    while True: pass",
    "a fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "a memory bomb": "all = []\nwhile True:\n    all.append(bytearray(10**7))",
    "a big file": "file = open('x', 'wb')\nwhile True:\n    file.write(bytes(10**6))",
    "many files": "n = 0\nwhile True:\n    n += 1\n    open(f'x{n}', 'wb').write(bytes(10**6))",
    "gigabytes of output": "import os\nwhile True:\n    os.write(1, bytes(10**6))\n    os.write(2, bytes(10**6))",
    "killing its parent": "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
    "killing itself": "import os\nos.kill(os.getpid(), 9)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "recursion": "def f(x):\n    return f(x)",
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', 80), timeout=5)",
    "reading a file": "open('/etc/passwd').read()",
    "a command": "import subprocess\nsubprocess.run(['sh', '-c', 'true'], check=True)",
    "input": "input()",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_code_passes_nothing_and_leaves_nothing_running(what: str) -> None:
    after = "" if "def f" in HOSTILE[what] else f"\n{RIGHT}"
    limits = Limits(cpu_seconds=1, wall_seconds=4) if "bomb" in what else Limits(cpu_seconds=1, wall_seconds=120)
    assert count(HOSTILE[what] + after, limits) == 0
    assert _children() == []


PRETENDING = {
    "leaving with success": "import sys\nsys.exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "leaving from the tested function": "import os\ndef f(x):\n    os._exit(0)",
    "raising SystemExit in a test": "def f(x):\n    raise SystemExit(0)",
    "writing a report": (
        'import os\nfor n in range(64):\n    try:\n        os.write(n, b\'{"passed": 3, "refused": {}}\')\n'
        "    except OSError:\n        pass\nos._exit(0)"
    ),
    "replacing what runs the tests": (
        "import builtins, json, os, socket\nsame = builtins.compile\nbuiltins.exec = lambda *a: None\n"
        "builtins.compile = lambda *a, **k: same('1', '', 'exec')\nbuiltins.BaseException = ()\n"
        "builtins.len = lambda x: 16\nbuiltins.bytes = lambda *a: b''\nos._exit = lambda code: None\n"
        "socket.socket.sendall = lambda *a: None\njson.loads = lambda text: 'pass'\nbuiltins.AssertionError = int"
    ),
    "replacing what tests call": "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x):\n    return 10**6",
}


ALWAYS_EQUAL = """
class Equal(int):
    def __eq__(self, other):
        return True
    __hash__ = int.__hash__
def f(x):
    return Equal()
"""


def test_what_is_equal_to_everything_is_equal_to_no_plain_data() -> None:
    tests = [
        "assert f(1) == 2",
        "assert 2 == f(1)",
        "assert [f(1), 'a'] == [2, 'a']",
        "assert {'a': (f(1),)} == {'a': (2,)}",
        "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)",
    ]
    assert count(ALWAYS_EQUAL, tests=tests) == 0
    assert count(ALWAYS_EQUAL, tests=["assert f(1) == f(2)", "assert 1 + 1 == 2 == 3 - 1"]) == 2


def test_other_equalities_are_those_of_python() -> None:
    code = (
        "import collections, dataclasses, enum, fractions, decimal\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "class Colour(enum.IntEnum):\n    RED = 1\n"
        "class Odd:\n    def __eq__(self, other):\n        return isinstance(other, Odd)\n"
        "Pair = collections.namedtuple('Pair', 'a b')\nclass Plain:\n    pass\none = Plain()\n"
    )
    tests = [
        "assert Point(1) == Point(1) and not Point(1) == Point(2)",
        "assert Colour.RED == 1 and [Colour.RED] == [1]",
        "assert Pair(1, 2) == (1, 2)",
        "assert fractions.Fraction(4, 2) == 2 and decimal.Decimal(2) == 2 and True == 1 and 1.0 == 1",
        "assert Odd() == Odd() and one == one and not one == Plain()",
        "assert collections.Counter('aab') == {'a': 2, 'b': 1}",
        "deep = []\nfor _ in range(500):\n    deep = [deep]\nassert deep == deep",
    ]
    assert count(code, tests=tests) == len(tests)


@pytest.mark.parametrize("what", PRETENDING)
def test_pretending_passes_nothing(what: str) -> None:
    assert count(PRETENDING[what], tests=["assert f(1) == 2", "assert abs(f(1) - 2) < 0.1"]) == 0


def test_the_code_finds_neither_its_tests_nor_their_keys_before_it_was_executed() -> None:
    code = (
        "import gc, sys\nframe, seen = sys._getframe(), []\n"
        "while frame:\n    seen.append(repr(frame.f_locals))\n    frame = frame.f_back\n"
        "for one in gc.get_objects():\n"
        "    inside = one.values() if type(one) is dict else one if type(one) in (list, tuple) else ()\n"
        "    seen += [value for value in inside if type(value) is str]\n"
        "wanted = ''.join(['secret', 'word'])\nassert not any(wanted in one for one in seen)\nx = 1\n"
    )
    assert count(code, tests=["assert x == 1 or 'secretword'"]) == 1
    assert count(f"hint = ['secretword']\n{code}", tests=["assert x == 1"]) == 0  # it does look


def test_the_limits_are_those_that_were_given() -> None:
    code = (
        "import os, resource\n"
        "def children():\n    number = 0\n    while True:\n        try:\n            if os.fork() == 0:\n"
        "                os.setsid()\n                signal.pause()\n"
        "        except OSError:\n            return number\n"
        "        number += 1\nimport signal\n"
        "def limit(name):\n    return resource.getrlimit(getattr(resource, name))\n"
    )
    tests = [
        "assert children() == 7 - 2",  # the keeper and the runner are two of them
        "assert limit('RLIMIT_CPU') == (3, 3)",
        "assert limit('RLIMIT_AS') == (300 << 20, 300 << 20)",
        "assert limit('RLIMIT_FSIZE') == (5 << 20, 5 << 20)",
        "place = os.statvfs('/tmp'); assert place.f_blocks * place.f_frsize == 5 << 20",
    ]
    assert count(code, Limits(3, 120, 300, 5, 7), tests) == 5


def test_what_is_done_in_time_counts_and_the_rest_does_not() -> None:
    code = "import time\ndef f(x):\n    if x == 3:\n        time.sleep(1000)\n    return x\n"
    start = time.monotonic()
    assert count(code, Limits(wall_seconds=5), ["assert f(1) == 1", "assert f(3) == 3", "assert f(2) == 2"]) == 1
    assert time.monotonic() - start < 100  # and not the code's thousand seconds


def test_as_many_run_at_a_time_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cores() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert cores() == 1


def test_a_trainer_that_is_killed_takes_the_code_with_it() -> None:
    script = (
        "from stagekit.sandbox import Limits, passed\n"
        "passed(['import time; time.sleep(1000)'], [['pass']], Limits(wall_seconds=1000))"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent.parent)
    try:
        _until(lambda: len(_descendants(trainer.pid)) == 3)
        below = _descendants(trainer.pid)
    finally:
        trainer.kill()
        trainer.wait()
    _until(lambda: not any(Path("/proc", str(one)).exists() for one in below))


WITHOUT_A_NETWORK_NAMESPACE = """
import json, logging, sys
from pathlib import Path
Path("/proc/sys/user/max_net_namespaces").write_text("0")
from stagekit import sandbox
said = []
sandbox.logger.warning = lambda text, named: said.append(named)
try:
    sandbox.passed(["x = 1"], [["assert x == 1"]])
except sandbox.Refused as error:
    refused = [error.refused, str(error)]
found = sandbox.passed(["x = 1"] * 3, [["assert x == 1"]] * 3, unsafe=True)
print(json.dumps([*refused, found, said]))
"""


def _with_fewer_namespaces(script: str) -> list[object]:
    """What a script prints that runs as the root of a namespace of users, where it can take limits from itself."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    place = [shutil.which("unshare"), "--user", "--map-root-user", sys.executable, "-c", script]
    ran = subprocess.run(place, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    if "max_net_namespaces" in ran.stderr:
        pytest.skip("the limit of namespaces cannot be set here")
    assert ran.returncode == 0, ran.stderr
    found: list[object] = json.loads(ran.stdout)
    return found


def test_a_kernel_that_refuses_the_network_is_named_and_unsafe_runs_without_and_says_so_once() -> None:
    refused, message, found, said = _with_fewer_namespaces(WITHOUT_A_NETWORK_NAMESPACE)
    assert isinstance(refused, dict) and set(refused) == {"network"}
    assert "the kernel refuses network: " in str(message) and "unsafe: true" in str(message)
    assert found == [1, 1, 1]
    assert isinstance(said, list) and len(said) == 1 and said[0].startswith("network (")


def test_every_protection_that_can_be_refused_is_in_the_message() -> None:
    told = str(Refused(dict.fromkeys(sandbox_child.NAMESPACES, "no")))
    assert all(f"{name}: no" in told for name in ("network", "processes", "files"))


def test_a_supervisor_that_ends_without_a_report_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('no such thing')")
    monkeypatch.setattr(sandbox, "_CHILD", broken)
    with pytest.raises(StageError, match=r"ended without a report(?s:.*)no such thing"):
        passed([RIGHT], [TESTS])


def _children() -> list[int]:
    return _descendants(os.getpid(), "sandbox_child")


def _descendants(pid: int, named: str = "") -> list[int]:
    """Processes below one, from /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            try:
                command = Path(f"/proc/{child}/cmdline").read_text()
            except OSError:
                continue  # it has just ended
            found += [child] if named in command else []
            found += _descendants(child, named)
    return found


def _until(holds: object) -> None:
    assert callable(holds)
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("never came true")
