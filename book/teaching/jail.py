"""Run a command that nobody vouches for: Linux namespaces, set up by util-linux's own commands.

The command sees a root folder of its own in which exist the listed paths, read-only, and nothing else of this machine;
an empty /submission, its home, and /tmp in memory; /proc with its own processes; no network device but a dead loopback.
It has no capability and can gain none. It runs as another user where the caller is root, else as the caller's own user
in a user namespace, which `strength` says.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

USER = 62_000  # + slot: an id that belongs to nobody
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NEEDED = ("unshare", "mount", "chroot", "setpriv", "prlimit", "env")

# $1: an empty folder, the new root; $2: the user's id, or "own"; then paths, "--" and the command.
SCRIPT = """
root=$1 user=$2; shift 2
mount -t tmpfs -o mode=755,size=16m jail "$root"
for folder in tmp submission dev/shm; do  # before the paths: some of them may lie below /tmp
  mkdir -p "$root/$folder"; mount -t tmpfs -o mode=1777,size=256m,nosuid,nodev jail "$root/$folder"
done
while [ "$1" != -- ]; do
  mkdir -p "$root$(dirname "$1")"
  if [ -L "$1" ]; then ln -s "$(readlink "$1")" "$root$1"
  elif [ -d "$1" ]; then
    mkdir -p "$root$1"; mount --bind "$1" "$root$1"; mount -o remount,bind,ro,nosuid,nodev "$root$1"
  else
    : > "$root$1"; mount --bind "$1" "$root$1"
    case "$1" in /dev/*) ;; *) mount -o remount,bind,ro,nosuid,nodev "$root$1" ;; esac
  fi
  shift
done
shift
mkdir -p "$root/proc"; mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -o remount,ro jail "$root"
if [ "$user" != own ]; then drop="--reuid=$user --regid=$user --clear-groups"; fi
exec chroot "$root" setpriv ${drop:-} --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


def strength() -> str:
    """What holds on this machine, in words. Raises RuntimeError saying what is missing."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError(
            f"no isolation on {sys.platform}: it needs Linux namespaces; use a Linux machine or container"
        )
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        raise RuntimeError(f"no isolation: {', '.join(missing)} not found; install util-linux and coreutils")
    if why := _refused():
        raise RuntimeError(f"no isolation: namespaces are refused here ({why}); run the grader as root")
    if os.geteuid() == 0:
        return "another user, no network, only the listed folders"
    return "your own user without any capability, no network, only the listed folders; as root: another user"


@functools.cache
def _refused() -> str:
    """Why a trivial command does not run in the jail, or "". Tried once."""
    try:
        with Folder() as root:
            done = subprocess.run(command(root, ["/usr/bin/true"]), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (
        "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1:][0] if done.stderr else "no reason given"
    )


class Folder:
    """An empty private folder, to become the root; what is mounted there is gone with the command that mounted it."""

    def __enter__(self):
        import tempfile

        self.path = tempfile.mkdtemp(prefix="jail-")
        return self.path

    def __exit__(self, *_):
        os.rmdir(self.path)


def command(root, arguments, paths=(), slot=0, limits=(), environment=None) -> list[str]:
    """The whole command line.

    root: an empty folder. paths: what exists besides the system, at the same place. slot: of those that run side by
    side. limits: options of prlimit. environment: all of it.
    """
    root_here = os.geteuid() == 0
    spaces = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    spaces += [] if root_here else ["--user", "--map-root-user"]
    exists = [path for path in (*SYSTEM, *DEVICES) if os.path.lexists(path)]
    exists += outermost(map(str, paths), exists)
    variables = [
        f"{name}={value}" for name, value in {"HOME": "/submission", "PATH": "/usr/bin", **(environment or {})}.items()
    ]
    inside = ["prlimit", "--core=0", *limits, "env", "-i", "--chdir=/submission", *variables, *arguments]
    user = str(USER + slot) if root_here else "own"
    return ["unshare", *spaces, "sh", "-euc", SCRIPT, "jail", root, user, *exists, "--", *inside]


def outermost(paths, known) -> list[str]:
    """The paths that lie below no other, in order: a folder inside one that is there needs no mount of its own."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(Path(path).is_relative_to(other) for other in [*known, *kept] if not os.path.islink(other)):
            kept.append(path)
    return kept
