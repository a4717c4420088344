"""Programs that try to do harm, with the verdict that each has to get. Never run them outside a sandbox.

Each prints PWNED when it got what it wanted; what it may want is handed to it on standard input as JSON: a world
readable ``secret``, a ``private`` file of the judge's own user, the pids of the judge and of a ``victim``, a TCP
``port``, a ``unix`` socket and an ``abstract`` one, a directory ``outside`` and the ``token`` that must not be found.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hostile:
    name: str
    source: str
    status: str
    language: str = "python"
    signal: int | None = None
    exit_code: int | None = None


_HEAD = """
import json, os, sys
given = json.loads(sys.stdin.read())
"""

_PYTHON: dict[str, tuple[str, str]] = {
    # --- processes and threads ---
    "fork bomb": ("runtime-error", "for _ in range(100):\n    os.fork()\n    print('PWNED')\n"),
    "vfork and clone": (
        "runtime-error",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for number in (56, 57, 58, 435):\n    if libc.syscall(number, 17, 0, 0, 0, 0) >= 0: print('PWNED', number)\n"
        "sys.exit(1)\n",
    ),
    "thread bomb": (
        "runtime-error",
        "import threading, time\nthreading.stack_size(65536)\n"
        "for n in range(3000):\n    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "    if n > 400: print('PWNED'); break\n",
    ),
    "children share memory out": (
        "runtime-error",
        "for _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(70 << 20)\n        print('PWNED')\n",
    ),
    "daemon": (
        "runtime-error",
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        import time; time.sleep(30)\n"
        "print('PWNED')\n",
    ),
    "child holds stdout": ("runtime-error", "import subprocess\nsubprocess.Popen(['sleep', '30'])\nprint('PWNED')\n"),
    "shell": ("runtime-error", "if os.system('echo PWNED') != 0: sys.exit(1)\n"),
    "exec": ("runtime-error", "os.execv('/usr/bin/env', ['env', 'echo', 'PWNED'])\n"),
    "thread outlives main": (
        "timeout",
        "import threading\ndef loop():\n    while True: pass\nthreading.Thread(target=loop).start()\n",
    ),
    # --- memory and output ---
    "10 GB": ("memory", "x = bytearray(10 << 30)\n"),
    "memory page by page": (
        "memory",
        "import mmap\nkept = []\nwhile True:\n    m = mmap.mmap(-1, 8 << 20)\n    m.write(b'x' * (8 << 20))\n    kept.append(m)\n",
    ),
    "list that grows": ("memory", "x = [0]\nwhile True: x += x\n"),
    "memory files": (
        "runtime-error",
        "kept = []\nfor n in range(64):\n    fd = os.memfd_create('x')\n    os.write(fd, b'x' * (1 << 20))\n    kept.append(fd)\n"
        "print('PWNED')\n",
    ),
    "stdout flood": ("output-limit", "while True: sys.stdout.write('x' * 65536)\n"),
    "stderr flood": ("output-limit", "while True: sys.stderr.write('x' * 65536)\n"),
    "sparse stdout": ("runtime-error", "os.ftruncate(1, 1 << 40)\nprint('PWNED')\n"),
    "flood and exit 0": (
        "output-limit",
        "try:\n    for _ in range(100): os.write(1, b'x' * 65536)\nexcept OSError: pass\nos._exit(0)\n",
    ),
    # --- time ---
    "busy loop": ("timeout", "while True: pass\n"),
    "sleep": ("timeout", "import time\ntime.sleep(3600)\n"),
    "signals ignored": (
        "timeout",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass\n",
    ),
    "loop in C": ("timeout", "import itertools\nsum(itertools.repeat(0))\n"),
    "stops itself": ("timeout", "import signal\nos.kill(os.getpid(), signal.SIGSTOP)\n"),
    "raises its limits": (
        "timeout",
        "import resource\n"
        "for name in ('RLIMIT_CPU', 'RLIMIT_AS', 'RLIMIT_FSIZE', 'RLIMIT_NPROC', 'RLIMIT_NOFILE'):\n"
        "    which = getattr(resource, name)\n    before = resource.getrlimit(which)\n"
        "    try: resource.setrlimit(which, (resource.RLIM_INFINITY,) * 2)\n    except (OSError, ValueError): pass\n"
        "    if resource.getrlimit(which)[1] > before[1] or resource.getrlimit(which)[1] < 0: print('PWNED', name)\n"
        "while True: pass\n",
    ),
    # --- files ---
    "accounts": (
        "runtime-error",
        "for name in ('passwd', 'shadow', 'hostname', 'ssh/sshd_config'):\n"
        "    try: print('PWNED', open('/etc/' + name).read(40))\n    except OSError: pass\nsys.exit(1)\n",
    ),
    "world-readable secret": ("runtime-error", "print('PWNED', open(given['secret']).read())\n"),
    "private file of the judge's user": ("runtime-error", "print('PWNED', open(given['private']).read())\n"),
    "symlink to a secret": (
        "runtime-error",
        "os.symlink(given['secret'], 'link')\nprint('PWNED', open('link').read())\n",
    ),
    "hard link to a secret": ("runtime-error", "os.link(given['secret'], 'link')\nprint('PWNED', open('link').read())\n"),
    "search for the expected output": (
        "ok",
        "for top in ('/tmp', '/box', '/kdkit', '/var', '/home', '/root', '/etc', '/opt', '/mnt', '/dev'):\n"
        "    for place, dirs, files in os.walk(top):\n"
        "        if any(name.startswith('expected') for name in files): print('PWNED', place)\n"
        "for name in (given['outside'], os.path.dirname(given['secret']), '/root', '/home'):\n"
        "    try: found = os.listdir(name)\n    except OSError: continue\n    if found: print('PWNED', name)\n",
    ),
    "writes outside": (
        "ok",
        "for place in (given['outside'], '/', '/usr/lib', '/var/tmp', '/dev', '/dev/shm', '/etc', '/root', '/kdkit', '/python'):\n"
        "    try:\n        open(place + '/kdkit-hostile', 'w').write('x')\n        print('PWNED', place)\n"
        "    except OSError: pass\n",
    ),
    "truncates and removes": (
        "ok",
        "for act in (os.unlink, lambda p: os.truncate(p, 0), lambda p: os.rename(p, p + '2'), lambda p: os.chmod(p, 0o777)):\n"
        "    for path in (given['private'], given['secret']):\n        try:\n            act(path)\n            print('PWNED')\n"
        "        except OSError: pass\n",
    ),
    "fills the disk": (
        "runtime-error",
        "written = 0\nfor n in range(200):\n    with open(f'f{n}', 'wb') as f: written += f.write(b'x' * (1 << 19))\n"
        "    if written > 32 << 20: print('PWNED')\n",
    ),
    "fills the inodes": (
        "runtime-error",
        "for n in range(20000):\n    open(f'f{n}', 'w').close()\n    if n > 2000: print('PWNED')\n",
    ),
    "deep directories": (
        "runtime-error",
        "for n in range(5000):\n    os.mkdir('d')\n    os.chdir('d')\n    if n > 2000: print('PWNED')\n",
    ),
    "set-uid": ("runtime-error", "open('x', 'w').close()\nos.chmod('x', 0o4777)\nprint('PWNED')\n"),
    "devices": (
        "ok",
        "for name in ('mem', 'kmsg', 'kvm', 'fuse', 'vda', 'sda', 'ptmx', 'tty', 'net/tun', 'shm/x'):\n"
        "    try:\n        os.open('/dev/' + name, os.O_RDWR)\n        print('PWNED', name)\n    except OSError: pass\n",
    ),
    # --- other processes and the kernel ---
    "environment": ("ok", "print(*('PWNED' for name, value in os.environ.items() if given['token'] in name + value))\n"),
    "environment of others": (
        "ok",
        "for pid in (given['judge'], given['victim'], os.getppid(), 1, 'self', 'thread-self'):\n"
        "    for name in ('environ', 'cmdline', 'maps', 'mem', 'root/etc/passwd'):\n"
        "        try: text = open(f'/proc/{pid}/{name}', 'rb').read(100)\n        except OSError: continue\n"
        "        print('PWNED', pid, name)\n",
    ),
    "proc and sys switches": (
        "ok",
        "for path in ('/proc/sys/kernel/core_pattern', '/proc/sysrq-trigger', '/proc/self/oom_score_adj',\n"
        "             '/sys/kernel/uevent_helper', '/sys/fs/cgroup/cgroup.procs'):\n"
        "    try:\n        open(path, 'r+').write('x')\n        print('PWNED', path)\n    except OSError: pass\n",
    ),
    "kills others": (
        "ok",
        "for pid in (given['judge'], given['victim'], os.getppid(), 1, 2, 3, -1, 0):\n"
        "    if pid == os.getpid(): continue\n"
        "    try:\n        os.kill(pid, 9)\n        print('PWNED', pid)\n    except OSError: pass\n"
        "try:\n    os.killpg(given['victim'], 9)\n    print('PWNED')\nexcept OSError: pass\n",
    ),
    "traces the judge": ("security-violation", "import ctypes\nctypes.CDLL(None).ptrace(16, given['judge'], 0, 0)\nprint('PWNED')\n"),
    "reads the judge's memory": (
        "security-violation",
        "import ctypes\nctypes.CDLL(None).process_vm_readv(given['judge'], None, 0, None, 0, 0)\nprint('PWNED')\n",
    ),
    "loads a BPF program": ("security-violation", "import ctypes\nctypes.CDLL(None).syscall(321, 0, 0, 0)\nprint('PWNED')\n"),
    "other system calls": (
        "ok",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        # unshare, mount, pivot_root, setns, io_uring_setup, keyctl, add_key, userfaultfd, perf_event_open, memfd_create,
        # open_by_handle_at, fanotify_init, inotify_init1, shmget, msgget, semget, mq_open, pidfd_open, seccomp, prctl(NNP)
        "for number, *args in ((272, 0x10000000), (165, 0, 0, 0, 0, 0), (155, 0, 0), (308, 0, 0), (425, 8, 0), (250, 0, -3, 0),\n"
        "    (248, 0, 0, 0, 0, 0), (323, 0), (298, 0, 0, -1, -1, 0), (319, b'x', 0), (304, 0, 0, 0), (300, 0, 0), (294, 0),\n"
        "    (29, 0, 4096, 0o1600), (68, 0, 0o1600), (64, 0, 1, 0o1600), (240, b'x', 66, 0o600, 0), (434, given['judge'], 0),\n"
        "    (317, 0, 0, 0), (157, 38, 1, 0, 0, 0), (203, 0, 8, b'\\x01' * 8), (141, 0, 0, 5), (103, 3, 0, 0), (302, given['judge'], 0, 0, 0)):\n"
        "    if libc.syscall(number, *args) >= 0: print('PWNED', number)\n",
    ),
    "32-bit system calls": (
        "security-violation",
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        # mov eax, 20 (getpid of i386); int 0x80; ret
        "page.write(bytes.fromhex('b814000000cd80c3'))\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "print('PWNED', ctypes.CFUNCTYPE(ctypes.c_int)(address)())\n",
    ),
    # --- network ---
    "connects": (
        "ok",
        "import socket\nfor family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM), (socket.AF_INET6, socket.SOCK_STREAM)):\n"
        "    try:\n        s = socket.socket(family, kind)\n        s.settimeout(1)\n        s.connect(('127.0.0.1', given['port']))\n        s.send(b'x')\n        print('PWNED')\n"
        "    except OSError: pass\n",
    ),
    "listens": ("runtime-error", "import socket\nsocket.create_server(('127.0.0.1', 0))\nprint('PWNED')\n"),
    "unix sockets": (
        "ok",
        "import socket\nfor address in (given['unix'], '\\0' + given['abstract']):\n"
        "    try:\n        s = socket.socket(socket.AF_UNIX)\n        s.connect(address)\n        print('PWNED')\n    except OSError: pass\n",
    ),
    "odd socket families": (
        "ok",
        "import socket\nfor family in (16, 17, 38, 40, 31, 44):\n"
        "    try:\n        socket.socket(family, socket.SOCK_RAW)\n        print('PWNED', family)\n    except OSError: pass\n",
    ),
    # --- games with the verdict ---
    "kills itself after the answer": ("runtime-error", "print(42, flush=True)\nos.kill(os.getpid(), 9)\n"),
    "exit 137": ("runtime-error", "sys.exit(137)\n"),
    "exit with a text": ("runtime-error", "sys.exit('all tests passed')\n"),
    "claims an infrastructure error": (
        "runtime-error",
        "print('infra-error: the fork server is gone', file=sys.stderr)\nos._exit(125)\n",
    ),
    "forges the reply": (
        "runtime-error",
        "text = b'{\"state\": \"ran\", \"exit_code\": 0}'\nfor fd in range(3, 256):\n"
        "    try:\n        os.write(fd, text)\n        print('PWNED', fd)\n    except OSError: pass\nsys.exit(1)\n",
    ),
    "no compile after the fact": ("runtime-error", "try: os.write(3, b'C')\nexcept OSError: pass\nraise SyntaxError('no')\n"),
    "takes os._exit away": ("runtime-error", "os._exit = lambda code: None\nraise ValueError\n"),
    "walks the frames": (
        "runtime-error",
        "del given\nframe = sys._getframe()\nwhile frame:\n"
        "    if 'canary' + '5f3a' in repr(frame.f_locals): print('PWNED')\n"
        "    frame = frame.f_back\nsys.exit(1)\n",
    ),
    "replaces stdout": ("runtime-error", "class Any:\n    def __eq__(self, other): return True\nsys.stdout = Any()\nsys.exit(1)\n"),
    "crash": ("runtime-error", "import ctypes\nctypes.string_at(0)\n"),
    "shadows modules": ("runtime-error", "for name in ('random', 'math', 'json'): open(name + '.py', 'w').write('print(1)')\nsys.exit(1)\n"),
}

_RAW = {
    "unclosed bracket": ("compile-error", "print((((1\n"),
    "nested brackets": ("compile-error", "(" * 5000 + ")" * 5000),
    "null byte": ("compile-error", "print(1)\0"),
    "lone surrogate": ("compile-error", "print('\ud800')"),
    "return outside": ("compile-error", "return 1\n"),
}

_CPP: dict[str, tuple[str, str]] = {
    "C++ fork bomb": (
        "runtime-error",
        "#include <unistd.h>\n#include <cstdio>\nint main() { for (int i = 0; i < 50; i++) if (fork() >= 0) puts(\"PWNED\"); return 1; }",
    ),
    "C++ memory": (
        "memory",
        "#include <vector>\nint main() { std::vector<char*> v; for (;;) { char* p = new char[1 << 20]; for (int i = 0; i < 1 << 20; i += 4096) p[i] = 1; v.push_back(p); } }",
    ),
    "C++ loop": ("timeout", "int main() { volatile int i = 0; for (;;) i++; }"),
    "C++ flood": ("output-limit", '#include <cstdio>\nint main() { for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"); }'),
    "C++ crash": ("runtime-error", "int main() { *(volatile int*)8 = 1; }"),
    "C++ trace": (
        "security-violation",
        '#include <sys/ptrace.h>\n#include <cstdio>\nint main() { ptrace(PTRACE_TRACEME, 0, 0, 0); puts("PWNED"); }',
    ),
    "C++ reads files": (
        "runtime-error",
        "#include <cstdio>\n#include <initializer_list>\nint main() { for (auto p : {\"@SECRET@\", \"/etc/passwd\", \"/proc/self/environ\", \"@PRIVATE@\"})"
        ' if (fopen(p, "r")) puts("PWNED"); return 1; }',
    ),
    "C++ shell": (
        "runtime-error",
        '#include <unistd.h>\nint main() { execl("/bin/sh", "sh", "-c", "cat @SECRET@ && echo PWNED; exit 1", (char*)0); return 1; }',
    ),
    "C++ socket": (
        "runtime-error",
        '#include <sys/socket.h>\n#include <cstdio>\nint main() { if (socket(AF_INET, SOCK_STREAM, 0) >= 0) puts("PWNED"); return 1; }',
    ),
    "#include of a secret": ("compile-error", '#include "@SECRET@"\nint main() {}'),
    "#include of a private file": ("compile-error", '#include "@PRIVATE@"\nint main() {}'),
    "#include of /dev/zero": ("compile-error", '#include "/dev/zero"\nint main() {}'),
    ".incbin of a secret": ("compile-error", 'asm(".incbin \\"@SECRET@\\"");\nint main() {}'),
    "template bomb": (
        "compile-error",
        "template<int N, class T> struct A { A<N - 1, A<N, T>> a; A<N - 1, A<N + 1, T>> b; };\n"
        "template<class T> struct A<0, T> {};\nA<40, int> x;\nint main() {}",
    ),
    "1 GiB of data": ("compile-error", "char data[1 << 30] = {1};\nint main() { return data[5]; }"),
    "does not compile": ("compile-error", "int main() { return x; }"),
}

PYTHON = [Hostile(name, _HEAD + source, status) for name, (status, source) in _PYTHON.items()]
PYTHON += [Hostile(name, source, status) for name, (status, source) in _RAW.items()]
CPP = [Hostile(name, source, status, language="cpp") for name, (status, source) in _CPP.items()]
EXACT = {
    "kills itself after the answer": (None, 9),
    "exit 137": (137, None),
    "exit with a text": (1, None),
    "claims an infrastructure error": (125, None),
    "crash": (None, 11),
    "C++ crash": (None, 11),
}
"""Exit code and signal of some of them."""
