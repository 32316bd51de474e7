#!/usr/bin/env python3
"""What works on this kernel: one boot's column of scripts/vm --table. Runs in a guest, as root.

  table.py [WORD...]   a line "cell: ROW: ok ...", "... refused: what fsprov said" or "... FAIL why" for each row
  table.py --rebooted  the row of the boot after that
"""
import json, os, signal, subprocess, sys, time, traceback

import stories
from stories import Failed, KERNEL, RESENDS, USER, fsprov, must, run, told

WORK = stories.WORK
# What a kernel cannot do, and fsprov says so: anything else that is refused is a fault.
REFUSED = {'idmapped bind': KERNEL < (5, 12), 'overlay in `unshare -Urm`': KERNEL < (5, 11)}
KILLS = 12


class Refused(Exception): pass


def become():
    return ['setpriv', f'--reuid={USER}', f'--regid={USER}', '--init-groups', 'env', '-i', f'HOME=/home/{USER}', 'LC_ALL=C',
            'PATH=/vm/bin:/usr/bin:/bin:/usr/sbin:/sbin']


def sh(line, user=False):
    """Exit 5 is fsprov's word for what is not possible on this host."""
    done = subprocess.run([*(become() if user else []), 'sh', '-ec', line], cwd='/', stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=stories.PATIENCE)
    if done.returncode == 5: raise Refused(' '.join(line.strip() for line in done.stderr.splitlines() if not line.startswith('[WARN'))[:300])
    if done.returncode: raise Failed(f'exit {done.returncode}: {done.stdout}{done.stderr}'.strip()[-600:])
    warned = [line for line in done.stderr.splitlines() if line.startswith('[WARN')]
    return done.stdout.strip() + ('\nwarns' if warned else '')


def mounted_and_read(words, user=False, inside=':', enter='', writable=False):
    """Mount, read through it, `inside`, unmount; all in one shell, which `enter` may put into namespaces of its own."""
    place = f'/home/{USER}/r' if user else f'{WORK}/r'
    root = f'export FSPROV_ROOT=/home/{USER}/state; ' if user else ''
    line = (f'{root}R={place}; fsprov mount --id t {words} img $R >/dev/null; cat $R/etc/os-release | grep -q ID=stories; '
            f'if touch $R/etc/new 2>/dev/null; then [ {int(writable)} = 1 ]; else [ {int(writable)} = 0 ]; fi; {inside}; fsprov unmount t')
    if enter: line = f"{enter} sh -ec '{line}'"
    said = sh(line, user)
    return ' '.join(['ok', *(word for word in said.split('\n') if word)])


def probe():
    host = told('probe')
    lacking = [f'{one["backend"]}: {one.get("reason", one)}' for one in host['backends'] if not one['works']]
    return 'ok, auto is ' + host['auto'] + (f'; {"; ".join(lacking)}' if lacking else '')


def imports():
    for flag, ending in (('', 'tar'), ('-z', 'tar.gz'), ('-J', 'tar.xz')):
        run('tar', *flag.split(), '-C', f'{WORK}/image', '-cf', f'{WORK}/i.{ending}', '.')
        fsprov('image', 'import', f'{WORK}/i.{ending}', '--name', f'img-{ending}')
    fsprov('image', 'verify')
    return 'ok'


def user_fuse():
    inside = 'bwrap --bind $R / --dev /dev --proc /proc --unshare-all cat /etc/os-release | grep -q stories'
    return mounted_and_read('--backend fuse', user=True, inside=inside)


WRITE = 'echo x >$R/w/x; rm $R/w/x'
VOLUME = f'-v {WORK}/vol:/w'


def root_copy(): return mounted_and_read('--backend copy', writable=True)
def root_fuse(): return mounted_and_read(f'--backend fuse {VOLUME}', inside=f'cat $R/w/data >/dev/null; {WRITE}')
def userns_bind(): return mounted_and_read('--backend bind', user=True, enter='unshare -Urm')
def root_overlay(): return mounted_and_read(f'--backend overlay {VOLUME}', inside=WRITE)
def root_overlay_writable(): return mounted_and_read('--backend overlay --writable', inside='rm $R/etc/os-release', writable=True)
def root_overlay_point(): return mounted_and_read(f'--backend overlay -v {WORK}/vol:/not/there', inside='cat $R/not/there/data >/dev/null')
def userns_overlay(): return mounted_and_read('--backend overlay', user=True, enter='unshare -Urm')


def writeback():
    return mounted_and_read(f'--backend fuse --writeback {VOLUME}', inside=f'echo many >$R/w/wb; grep -q many {WORK}/vol/wb; rm $R/w/wb')


def root_bind():
    inside = f'{WRITE}; if touch $R/var/lib/x 2>/dev/null; then exit 1; fi'
    return mounted_and_read(f'--backend bind {VOLUME} -v {WORK}/vol:/var/lib:ro', inside=inside)


def auto_missing_point():
    said = mounted_and_read(f'-v {WORK}/vol:/not/there', inside='cat $R/not/there/data >/dev/null; fsprov inspect --json t | grep "\\"backend\\": "')
    return said.replace('"backend": "', '(').replace('",', ')').replace('ok  ', 'ok ')


def idmapped_bind():
    return mounted_and_read('--backend bind --uid-map 0:100000:65536 --gid-map 0:100000:65536', inside='[ $(stat -c %u $R/etc/os-release) = 100000 ]')


def worker_killed():
    """Under six threads, on two readers' files."""
    stories.fsprov('mount', '--backend', 'fuse', '--id', 'img', '-v', f'{WORK}/vol:/w', 'img', f'{WORK}/k')
    readers = [stories.Reader(f'{WORK}/k', n) for n in range(2)]
    try:
        for _ in range(KILLS):
            worker = stories.inspect()['worker_pid']
            os.kill(worker, signal.SIGKILL)
            stories.eventually(lambda: stories.inspect()['worker_pid'] not in (worker, None, 0), 'a new worker')
            for reader in readers: reader.goes_on()
        return f'ok, {KILLS} kills: ' + ' and '.join(reader.seen(KILLS) for reader in readers)
    finally:
        for reader in readers: reader.process.kill()
        time.sleep(0.3)
        fsprov('unmount', '--lazy', 'img', check=False)


def rebooted():
    """The boot before left three mounted."""
    recovered = told('recover')
    must({one['id'] for one in recovered} == {'b1', 'b2', 'b3'}, f'{recovered}')
    for one in told('list'): must(one['state'] == 'ready', f'{one}')
    for n in (1, 2, 3): must('ID=stories' in open(f'{WORK}/b{n}/etc/os-release').read(), f'b{n} is not the image')
    fsprov('unmount', '--all')
    return 'ok'


ROWS = [('probe', probe), ('imports', imports), ("a user's fuse + bwrap", user_fuse), ('copy', root_copy), ("root's fuse + volume", root_fuse),
        ('writeback', writeback), ('bind + volumes', root_bind), ('bind in `unshare -Urm`', userns_bind),
        ('overlay as root, read-only', root_overlay), ('overlay as root, writable', root_overlay_writable),
        ('overlay as root, mount point made up', root_overlay_point), ('auto as root, mount point missing', auto_missing_point),
        ('overlay in `unshare -Urm`', userns_overlay), ('idmapped bind', idmapped_bind), ('worker SIGKILL under 6 threads', worker_killed)]


def cell(name, row):
    try:
        said = row()
        if REFUSED.get(name): said = f'FAIL: this kernel cannot, and it was not refused: {said}'
    except Refused as why: said = f'refused: {why}' if REFUSED.get(name) else f'FAIL: refused: {why}'
    except Failed as why: said = f'FAIL: {why}'
    except Exception: said = f'FAIL: {traceback.format_exc()}'
    fsprov('unmount', '--all', '--lazy', check=False)
    print(f'cell: {name}: ' + ' '.join(said.split()), flush=True)
    return 'FAIL' in said


def main(words):
    if words == ['--rebooted']: return cell('reboot and `recover`', rebooted)
    stories.prepare()
    sh(f'export FSPROV_ROOT=/home/{USER}/state; fsprov image import {WORK}/image --name img --replace', user=True)
    failed = [name for name, row in ROWS if (not words or any(word in name for word in words)) and cell(name, row)]
    for n, backend in enumerate(('bind', 'fuse', 'copy'), 1): fsprov('mount', '--backend', backend, '--id', f'b{n}', 'img', f'{WORK}/b{n}')
    os.sync()
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
