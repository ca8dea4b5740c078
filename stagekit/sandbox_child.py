"""The program that runs a completion's code and its tests apart from the trainer; started by `stagekit.sandbox`.

It is started with `python -I -S`, imports the standard library only, and never stagekit. Three processes:

* the supervisor reads the request, takes the namespaces, feeds the tests one by one, keeps the time and counts;
* the keeper is the first process of the new process namespace: it builds the file system, gives up its rights, and
  waits. When it ends, the kernel ends every process of the namespace, whatever session it has fled to;
* the runner executes the code, then each test, under the limits.

A test has passed when the runner sends back the key that came with it. Tests and keys reach the runner one by one,
after the code was executed, so that leaving early passes nothing.
"""

import ast
import builtins
import contextlib
import ctypes
import functools
import json
import os
import resource
import secrets
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


KEY_BYTES = 16
LENGTH_BYTES = 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_SETATTR = 442  # the same number on every architecture; Linux 5.12
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _AT_RECURSIVE, _AT_FDCWD = 1, 2, 0x8000, -100
_HIGH_UID = 2_000_000_000
"""Users that no machine gives out; the limit of processes counts those of a user."""
_NOBODY = 65534
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

NAMESPACES: Mapping[str, int] = {
    "network": _CLONE_NEWNET,
    "processes": _CLONE_NEWPID,
    "files": _CLONE_NEWNS,
    "ipc": _CLONE_NEWIPC,
}
"""What is kept apart -> the namespace that does it."""

libc = ctypes.CDLL(None, use_errno=True)


def called(name: str, *arguments: Any) -> None:
    """Call a function of the C library, or a system call by its number.

    Raises:
        OSError: it failed.
    """
    given = [ctypes.c_char_p(one) if isinstance(one, bytes) else one for one in arguments]
    if getattr(libc, name)(*given) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def take_namespaces(user: int) -> dict[str, str]:
    """Enter new namespaces; what was refused -> why.

    With the right to administer the system (root outside of a container) no namespace of users is needed, and the
    keeper becomes `user` later. Without it, a namespace of users gives the right over the others.
    """
    if os.geteuid() == 0:
        refused = _unshared()
        if len(refused) < len(NAMESPACES):
            return refused
        become(user)  # the kernel limits the processes of every user but the first
    uid, gid = os.geteuid(), os.getegid()
    try:
        called("unshare", _CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    except (OSError, AttributeError) as error:
        return dict.fromkeys(NAMESPACES, f"no namespace of users ({error})")
    return _unshared()


def _unshared() -> dict[str, str]:
    refused = {}
    for name, flag in NAMESPACES.items():
        try:
            called("unshare", flag)
        except (OSError, AttributeError) as error:  # no such function but on Linux
            refused[name] = str(error)
    return refused


def become(user: int) -> None:
    """Go on as another user, or as nobody where this machine has only few.

    Raises:
        OSError: there is no right to.
    """
    for one in (user, _NOBODY):
        try:
            os.setgroups([])
            os.setresgid(one, one, one)
            os.setresuid(one, one, one)
        except OSError:
            if one == _NOBODY:
                raise
        else:
            break
    called("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # else what /proc has of this process belongs to root


def build_files(root: str, folders: list[str], megabytes: int) -> None:
    """Make `root` the file system: the interpreter's libraries, read only, and a /tmp of limited size with nothing
    in it but those that lie there.

    Raises:
        OSError: the kernel refuses a part.
    """
    called("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    called("mount", b"tmpfs", root.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=4m,mode=0755")
    in_tmp = [folder for folder in folders if Path("/tmp") in Path(folder).parents]  # where an environment may lie
    for folder in folders:
        if folder not in in_tmp:
            _shown(root, folder)
    for device in _DEVICES:
        target = Path(root + device)
        target.parent.mkdir(exist_ok=True)
        target.touch()
        called("mount", device.encode(), str(target).encode(), None, _MS_BIND, None)
    Path(root, "etc").mkdir(exist_ok=True)
    if Path("/etc/ld.so.cache").is_file():
        Path(root, "etc/ld.so.cache").write_bytes(Path("/etc/ld.so.cache").read_bytes())
    Path(root, "tmp").mkdir(exist_ok=True)
    _read_only(root, recursive=False)
    limits = f"size={megabytes}m,nr_inodes={megabytes * 64},mode=1777".encode()
    called("mount", b"tmpfs", f"{root}/tmp".encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, limits)
    for folder in in_tmp:
        _shown(root, folder)
    os.chroot(root)  # and no pivot_root: in a changed root the kernel gives out no further namespace of users
    os.chdir("/tmp")


def _shown(root: str, folder: str) -> None:
    """Show a folder, or a symbolic link to one, inside, read only."""
    target = Path(root + folder)
    if target.exists() or target.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if Path(folder).is_symlink():
        target.symlink_to(Path(folder).readlink())
        return
    target.mkdir()
    called("mount", folder.encode(), str(target).encode(), None, _MS_BIND | _MS_REC, None)
    _read_only(str(target), recursive=True)


def _read_only(path: str, *, recursive: bool) -> None:
    # struct mount_attr: what is set, what is cleared, propagation, the file of a namespace of users
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    called("syscall", _MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, ctypes.sizeof(attributes))


def give_up_rights(user: int) -> None:
    """Drop every capability, for good; who is root becomes `user`.

    Raises:
        OSError: the kernel refuses it.
    """
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break  # behind the last one; or there is no right to drop them, and so none to use them
    if os.geteuid() == 0:
        become(user)
    libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
    called("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    called("capset", header, none)


def limit(limits: Mapping[str, int]) -> None:
    """Set the limits of this process and those that it starts, in the kernel's units (bytes, seconds, things)."""
    for name, value in limits.items():
        number = getattr(resource, name)
        hardest = resource.getrlimit(number)[1]
        value = value if hardest == resource.RLIM_INFINITY else min(value, hardest)
        resource.setrlimit(number, (value, value))


class Compared(ast.NodeTransformer):
    """Has `a == b` of a test ask `same`, so that an object that is equal to everything is not taken for an answer."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """A comparison of two by == as a call."""
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq):
            return node
        called = ast.Call(ast.Name("__same__", ast.Load()), [node.left, node.comparators[0]], [])
        return ast.fix_missing_locations(ast.copy_location(called, node))


def prepared(test: str) -> bytes:
    """A test as it is sent: each == asks `same`. What Python cannot read is sent as it is, and fails there."""
    try:
        return ast.unparse(Compared().visit(ast.parse(test))).encode()
    except (SyntaxError, ValueError, RecursionError):
        return test.encode(errors="replace")


_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_HOLDERS = (list, tuple, set, frozenset, dict)


def same(names: dict[str, Any]) -> Callable[[Any, Any], Any]:
    """What == is in a test: false where plain data meet an object whose `__eq__` the code wrote, else ==.

    Args:
        names: Those of the code, by which its functions are known.
    """
    any_of, kind, contents, has, holders, plain_kinds = any, type, dict.items, getattr, _HOLDERS, _PLAIN

    def own(value: Any, depth: int) -> bool:
        if kind(value) in holders and depth:
            inside = [one for pair in contents(value) for one in pair] if kind(value) is dict else value
            return any_of(own(one, depth - 1) for one in inside)
        return has(has(kind(value), "__eq__", None), "__globals__", None) is names

    def plain(value: Any, depth: int) -> bool:
        if kind(value) in holders and depth:
            inside = [one for pair in contents(value) for one in pair] if kind(value) is dict else value
            return not any_of(not plain(one, depth - 1) for one in inside)
        return kind(value) in plain_kinds

    def compared(left: Any, right: Any) -> Any:
        if (own(left, 8) and plain(right, 8)) or (own(right, 8) and plain(left, 8)):
            return False
        return left == right

    return compared


def run(code: str, channel: socket.socket) -> None:
    """Execute the code, then each test that comes, in a copy of the code's names; never returns.

    What is needed afterwards is held in local names, since the code may replace what it finds in modules.
    """
    execute, compiled, copied, leave, size, anything = exec, compile, dict, os._exit, len, BaseException
    receive, send, number, key_bytes, length_bytes = (
        channel.recv, channel.sendall, int.from_bytes, KEY_BYTES, LENGTH_BYTES)  # fmt: skip
    module, plain, failed = types.ModuleType("completion"), dict(vars(builtins)), bytes(KEY_BYTES)
    names = vars(module)
    equal = same(names)
    sys.modules["completion"] = sys.modules["__main__"] = module

    def exactly(count: int) -> bytes:
        found = b""
        while size(found) < count:
            part = receive(count - size(found))
            if not part:
                leave(0)
            found += part
        return found

    try:
        execute(compiled(code, "<completion>", "exec"), names)
    except anything:  # SystemExit too: a completion that leaves has passed nothing
        leave(1)
    while True:
        test = exactly(number(exactly(length_bytes), "big")).decode()
        try:
            own = copied(names, __name__="tests", __builtins__=plain, __same__=equal)
            execute(compiled(test, "<test>", "exec"), own)
        except anything:
            exactly(key_bytes)
            send(failed)
        else:
            send(exactly(key_bytes))


def keep(request: Mapping[str, Any], refused: dict[str, str], status: int, channel: socket.socket) -> None:
    """The keeper: build, give up, start the runner, wait for it; never returns."""
    os.setsid()
    for number in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    keeps = sorted((2, status, channel.fileno()))
    for low, high in zip(keeps, [*keeps[1:], 1 << 16], strict=True):
        os.closerange(low + 1, high)
    user = request["user"]
    build = functools.partial(build_files, request["root"], request["folders"], request["megabytes"])
    parts: dict[str, Callable[[], None]] = {} if "files" in refused else {"files": build}
    parts["rights"] = functools.partial(give_up_rights, user)
    for name, part in parts.items():
        try:
            part()
        except (OSError, AttributeError) as error:  # no such function but on Linux
            refused[name] = str(error)
    stops = bool(refused) and not request["unsafe"]
    os.write(status, json.dumps(refused).encode())
    os.close(status)
    if stops:
        os._exit(1)
    if "files" in refused:
        os.chdir(request["root"])
    die_with_parent()  # after the rights were given up: with them the kernel forgets it
    runner = os.fork()
    if runner == 0:
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path += request["packages"]
        sys.argv = ["completion"]
        limit(request["limits"])
        run(request["code"], channel)
    channel.close()
    while os.wait()[0] != runner:
        pass
    os._exit(0)


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends."""
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def supervise(request: dict[str, Any], tests: Callable[[], list[str]]) -> dict[str, Any]:
    """Run the code and its tests; what to report.

    Args:
        request: Everything but the tests.
        tests: Reads them; called when the code runs already, in a process that does not have them.

    Returns:
        `refused`: what the kernel does not give -> why. And `passed`, the number of tests that passed, unless it did
        not run for that.
    """
    request["user"] = _HIGH_UID + os.getpid()
    refused = take_namespaces(request["user"])
    if refused and not request["unsafe"]:
        return {"refused": refused}
    die_with_parent()
    ours, theirs = socket.socketpair()
    told, status = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        keep(request, refused, status, theirs)
    theirs.close()
    os.close(status)
    try:
        with os.fdopen(told, "rb") as stream:
            refused = json.loads(stream.read() or b'{"start": "its process ended"}')
        if refused and not request["unsafe"]:
            return {"refused": refused}
        return {"refused": refused, "passed": _fed(tests(), ours, request["wall_seconds"])}
    finally:
        for end in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                end(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)


def _fed(tests: list[str], channel: socket.socket, seconds: float) -> int:
    """Send each test with a new key; how many keys came back before the time was up or the runner ended."""
    deadline, passed = time.monotonic() + seconds, 0
    for test in tests:
        key, text, answer = secrets.token_bytes(KEY_BYTES), prepared(test), b""
        try:
            channel.settimeout(max(deadline - time.monotonic(), 1e-3))
            channel.sendall(len(text).to_bytes(LENGTH_BYTES, "big") + text + key)
            while len(answer) < KEY_BYTES:
                channel.settimeout(max(deadline - time.monotonic(), 1e-3))
                part = channel.recv(KEY_BYTES - len(answer))
                if not part:
                    return passed
                answer += part
        except OSError:  # out of time, or the runner has ended
            return passed
        passed += answer == key
    return passed


def _line() -> Any:
    """A line of the standard input, as JSON, and not a byte more."""
    found = bytearray()
    while not found.endswith(b"\n"):
        part = os.read(0, 1)
        if not part:
            break
        found += part
    return json.loads(found)


def main() -> None:
    """Read the request and the tests from the standard input, write the report to the standard output, as JSON."""
    length = _line()
    request = b""
    while len(request) < length:
        request += os.read(0, length - len(request))
    found = supervise(json.loads(request), lambda: list(json.load(sys.stdin)))
    os.write(1, json.dumps(found).encode())


if __name__ == "__main__":
    main()
