"""System call numbers of x86-64 and aarch64, from the kernel's headers, in the groups that the filter treats alike."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["ALLOWED", "ARCHITECTURES", "CONDITIONAL", "FATAL", "FORKING", "OWN", "number"]


def _entries(table: str) -> tuple[str, ...]:
    return tuple(table.split())


# name:x86-64:aarch64; - where the architecture has no such call.
ALLOWED: Final = _entries("""
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
preadv2:327:286 pwritev2:328:287 open:2:- openat:257:56 creat:85:- close:3:57 close_range:436:436 stat:4:-
fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:-
readlinkat:267:78 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 lseek:8:62 sendfile:40:71
copy_file_range:326:285 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 select:23:-
pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22
epoll_pwait2:441:441 eventfd:284:- eventfd2:290:19 timerfd_create:283:85 timerfd_settime:286:86
timerfd_gettime:287:87 signalfd4:289:74 mkdir:83:- mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:-
renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36 truncate:76:45
ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83 umask:95:166 fadvise64:221:223 mmap:9:222
munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233 msync:26:227 mincore:27:232 brk:12:214
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigtimedwait:128:137
rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:- alarm:37:- getitimer:36:102 setitimer:38:103
restart_syscall:219:128 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
gettimeofday:96:169 time:201:- times:100:153 timer_create:222:107 timer_settime:223:110 timer_gettime:224:108
timer_getoverrun:225:109 timer_delete:226:111 futex:202:98 futex_waitv:449:449 set_robust_list:273:99
get_robust_list:274:100 rseq:334:293 membarrier:324:283 set_tid_address:218:96 arch_prctl:158:- getpid:39:172
gettid:186:178 getppid:110:173 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148
getresgid:120:150 getgroups:115:158 getpgrp:111:- getpgid:121:155 getsid:124:156 getrlimit:97:163 setrlimit:160:164
getrusage:98:165 sysinfo:99:179 uname:63:160 capget:125:90 getrandom:318:278 getcpu:309:168 getpriority:140:141
sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120
sched_get_priority_max:146:125 sched_get_priority_min:147:126 sched_rr_get_interval:148:127 exit:60:93
exit_group:231:94 recvfrom:45:207 recvmsg:47:212 sendto:44:206 sendmsg:46:211 shutdown:48:210 getsockopt:55:209
getsockname:51:204
""")
"""Harmless with any argument."""
FORKING: Final = _entries("""
fork:57:- vfork:58:- wait4:61:260 waitid:247:95 chmod:90:- fchmod:91:52 fchmodat:268:53 utimensat:280:88
""")
"""What a compiler needs on top."""
CONDITIONAL: Final = _entries("""
fcntl:72:25 ioctl:16:29 prctl:157:167 prlimit64:302:261 kill:62:129 tgkill:234:131 rt_sigqueueinfo:129:138
rt_tgsigqueueinfo:297:240 socketpair:53:199 clone:56:220 clone3:435:435 execve:59:221 execveat:322:281
""")
"""Depends on the arguments."""
FATAL: Final = _entries("""
ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 bpf:321:280 kexec_load:246:104
kexec_file_load:320:294 init_module:175:105 finit_module:313:273 delete_module:176:106 quotactl:179:60
reboot:169:142
""")
"""No honest program makes these: the process is killed."""
OWN: Final = _entries("""
seccomp:317:277 unshare:272:97 setns:308:268 mount:165:40 umount2:166:39 capset:126:91
landlock_create_ruleset:444:444 landlock_add_rule:445:445 landlock_restrict_self:446:446 pidfd_open:434:434
pivot_root:155:41
""")
"""What the sandbox itself calls before the filter is there."""

ARCHITECTURES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine to its column above and to AUDIT_ARCH_*, which the kernel hands to the filter."""

_NUMBERS: Final = {
    name: numbers for entry in (*ALLOWED, *FORKING, *CONDITIONAL, *FATAL, *OWN) for name, *numbers in [entry.split(":")]
}


def number(name: str) -> int | None:
    """The number of the call ``name`` on this machine, None where there is none.

    Raises:
        KeyError: The machine's architecture or the name is not in the table.
    """
    column, _ = ARCHITECTURES[os.uname().machine]
    found = _NUMBERS[name.partition(":")[0]][column]
    return None if found == "-" else int(found)
