"""Opens the sandbox ``auto`` below a system call filter like that of container engines: nobody makes namespaces.

Prints what came of it as JSON. Rules of the default profile that matter here: no unshare, setns, mount or clone with a
namespace, and clone3 does not exist because its flags cannot be seen.
"""

from __future__ import annotations

import errno
import json
import os
import struct

from kdkit.api import SandboxJob, SandboxLimits
from kdkit.plugins.sandboxes.inside import linux, seccomp
from kdkit.plugins.sandboxes.providers import auto, bubblewrap

ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def container_filter() -> bytes:
    load = seccomp._step(seccomp._LOAD, 0)
    refused = seccomp._all(["unshare", "setns", "mount", "umount2", "pivot_root"], EPERM)
    flags = seccomp._step(seccomp._LOAD, 16) + seccomp._when(0x45, 0x7E020080, seccomp._step(6, EPERM))
    clone = seccomp._when(seccomp._EQUAL, seccomp._known("clone"), flags + seccomp._step(6, ALLOW))
    clone3 = seccomp._all(["clone3"], ENOSYS)
    return load + b"".join(refused) + clone + b"".join(clone3) + struct.pack("=HBBI", 6, 0, 0, ALLOW)


def main() -> dict[str, object]:
    linux.no_new_privileges()
    linux.set_filter(container_filter())
    report = bubblewrap(1).probe()
    session = auto(2).open(SandboxLimits(wall_s=8.0, cpu_s=2.0))
    try:
        good, bad = session.run([SandboxJob(program="print(1)"), SandboxJob(program="import os; os.fork()")])
    finally:
        session.close()
    return {
        "uid": os.getuid(),
        "bubblewrap": [report.usable, report.reason, report.hint],
        "chosen": session.name,
        "outcomes": [good.status, good.stdout, bad.status],
    }


if __name__ == "__main__":
    print(json.dumps(main()))
