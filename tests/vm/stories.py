#!/usr/bin/env python3
"""What fsprov does under a real systemd. Runs in a guest of scripts/vm --systemd, as root, with scripts/fsprov@.service as it is installed.

  stories.py [STORY...]    a line "story: NAME: PASS what was seen" or "... FAIL why" for each; exit status 1 after a FAIL
"""
import errno, json, os, pwd, shutil, signal, subprocess, sys, threading, time, traceback

USER = 'fsprov-test'
UNIT = 'fsprov@img.service'
PLACE = '/run/fsprov/img'
WORK = '/srv/stories'
KERNEL = tuple(int(n) for n in os.uname().release.split('.')[:2])
RESENDS = KERNEL >= (6, 9)      # FUSE_NOTIFY_RESEND: requests that a dead server read are given to the next
PATIENCE = 300                  # seconds for one command: emulation is slow, and a busy machine slower
WATCHDOG = 15                   # seconds, in the drop-in: the template's minute is long for a test
READERS = 3


class Failed(Exception): pass


def must(so, why):
    if not so: raise Failed(why() if callable(why) else why)


def run(*args, check=True, **more):
    done = subprocess.run([str(a) for a in args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=PATIENCE,
                          **{'stderr': subprocess.STDOUT, **more})
    if check and done.returncode: raise Failed(f'{" ".join(map(str, args))}: exit {done.returncode}: {done.stdout.strip()[-1500:]}')
    return done.stdout.strip()


def eventually(so, why, patience=PATIENCE):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try: got = so()
        except (Failed, OSError): got = None
        if got: return got
        time.sleep(0.1)
    raise Failed(f'not within {patience} s: {why() if callable(why) else why}')


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file: file.write(text)


def fsprov(*args, **more): return run('/usr/local/bin/fsprov', *args, **more)
def told(*args): return json.loads(fsprov(*args, '--json', stderr=subprocess.DEVNULL))
def inspect(): return told('inspect', 'img')
def show(name, unit=UNIT): return run('systemctl', 'show', '-P', name, unit)
def mounted(place=PLACE): return [line for line in open('/proc/self/mountinfo') if line.split()[4] == place]


def systemctl(*args, **more):
    try: return run('systemctl', *args, **more)
    except Failed as why: raise Failed(f'{why}\n{run("journalctl", "-n", "30", "--no-pager", "-o", "cat", check=False)}') from None


def make_image(at):
    """A root that a shell, systemd's RootDirectory= and nspawn can live in."""
    shutil.rmtree(at, ignore_errors=True)
    for name in ('bin', 'usr/bin', 'usr/lib', 'etc', 'proc', 'sys', 'dev', 'tmp', 'var/tmp', 'var/lib', 'root', 'w', 'run/systemd', 'run/host'):
        os.makedirs(f'{at}/{name}', exist_ok=True)
    shutil.copy('/vm/bin/busybox', f'{at}/bin/busybox')
    for name in ('sh', 'cat', 'id', 'ls', 'touch', 'true', 'stat', 'grep'): os.symlink('busybox', f'{at}/bin/{name}')
    write(f'{at}/etc/passwd', 'root:x:0:0::/root:/bin/sh\n')
    write(f'{at}/etc/group', 'root:x:0:\n')
    write(f'{at}/etc/os-release', 'ID=stories\nNAME=stories\n')
    os.symlink('../../etc/os-release', f'{at}/usr/lib/os-release')
    for name in ('machine-id', 'resolv.conf', 'hostname', 'localtime'): write(f'{at}/etc/{name}', '')
    with open(f'{at}/etc/data', 'wb') as file: file.write(os.urandom(1 << 20))
    os.chmod(f'{at}/tmp', 0o1777); os.chmod(f'{at}/var/tmp', 0o1777)


def prepare():
    """An image and a volume."""
    os.makedirs(WORK, exist_ok=True)
    shutil.copy('/vm/bin/fsprov', '/usr/local/bin/fsprov')
    make_image(f'{WORK}/image')
    shutil.copy(f'{WORK}/image/etc/data', f'{WORK}/data')
    os.makedirs(f'{WORK}/vol', exist_ok=True)
    write(f'{WORK}/vol/data', 'of the volume\n')
    fsprov('image', 'import', f'{WORK}/image', '--name', 'img', '--replace')


def drop_in(words=f'--backend fuse -v {WORK}/vol:/w', watchdog=60):
    """The template's own line with more options."""
    write(f'/etc/systemd/system/{UNIT}.d/more.conf',
          f'[Service]\nExecStart=\nExecStart=/usr/local/bin/fsprov mount --foreground {words} --id %i %i /run/fsprov/%i\n'
          f'WatchdogSec={watchdog}\nRestartSec=500ms\n[Unit]\nStartLimitIntervalSec=0\n')
    systemctl('daemon-reload')


def clear():
    systemctl('stop', UNIT, check=False)
    run('systemctl', 'reset-failed', check=False)
    shutil.rmtree(f'/etc/systemd/system/{UNIT}.d', ignore_errors=True)
    systemctl('daemon-reload')
    fsprov('unmount', '--all', '--lazy', check=False)


# --- who uses the rootfs meanwhile ---------------------------------------------------------------------------------------------------

def reader(place, report, log):
    """Reads an open file of the image past the page cache, opens and reads a file of the volume, appends to an open one there."""
    want = open(f'{WORK}/data', 'rb').read(1 << 16)
    state = {'calls': 0, 'errors': [], 'longest': 0.0, 'last': [0.0] * READERS}
    kept = os.open(f'{place}/etc/data', os.O_RDONLY)
    log = os.open(f'{place}/w/{log}', os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def image():
        os.posix_fadvise(kept, 0, 0, os.POSIX_FADV_DONTNEED)
        if os.pread(kept, 1 << 16, 0) != want: raise OSError(errno.EBADMSG, 'wrong bytes of the image')

    def volume():
        with open(f'{place}/w/data') as file:
            if file.read() != 'of the volume\n': raise OSError(errno.EBADMSG, 'wrong bytes of the volume')

    def append(): os.write(log, b'.')

    def loop(n, call):
        while True:
            begun = time.monotonic()
            try: call()
            except OSError as e: state['errors'].append([call.__name__, errno.errorcode.get(e.errno, str(e.errno))])
            now = time.monotonic()
            state['calls'] += 1
            state['longest'] = max(state['longest'], now - begun)
            state['last'][n] = now
            time.sleep(0.005)

    for n, call in enumerate((image, volume, append)): threading.Thread(target=loop, args=(n, call), daemon=True).start()
    while True:
        time.sleep(0.1)
        with open(report + '.part', 'w') as file: json.dump(state, file)
        os.rename(report + '.part', report)


class Reader:
    def __init__(self, place=PLACE, number=0):
        self.report = f'{WORK}/reader.{number}.json'
        if os.path.exists(self.report): os.unlink(self.report)
        self.process = subprocess.Popen([sys.executable, __file__, '--reader', place, self.report, f'log{number}'])
        eventually(lambda: min(self.state()['last']) > 0, 'the reader reads')

    def state(self):
        with open(self.report) as file: return json.load(file)

    def goes_on(self):
        """Each of its threads has done something since now."""
        now = time.monotonic()
        eventually(lambda: min(self.state()['last']) > now, lambda: f'the readers go on: {self.state()}')

    def end(self):
        state = self.state()
        self.process.kill(); self.process.wait()
        return state

    def seen(self, kills=1):
        """Ends it. Errors there may be none; where the kernel sends no request again, one for each that was in flight."""
        self.goes_on()
        state = self.end()
        errors = state['errors']
        names = sorted({f'{call} {name}' for call, name in errors})
        text = f'{state["calls"]} calls, {len(errors)} errors{" (" + ", ".join(names) + ")" if names else ""}, longest {state["longest"]:.1f} s'
        allowed = 0 if RESENDS else READERS * kills
        must(len(errors) <= allowed and all(name == 'EIO' for _, name in errors), f'the readers had {text}')
        return text


def start(watchdog=60):
    drop_in(watchdog=watchdog)
    systemctl('start', UNIT)
    return Reader(), inspect()['mount_id']


def went_on(mount_id, restarts):
    """The unit started again, and with the same mount."""
    eventually(lambda: int(show('NRestarts')) > restarts and show('ActiveState') == 'active', 'the unit starts again')
    now = inspect()['mount_id']
    must(now == mount_id and len(mounted()) == 1, f'another mount: {mount_id} then, {now} now; {mounted()}')


# --- the stories ---------------------------------------------------------------------------------------------------------------------

def ready():
    """The template as it is: started means mounted; the status says where."""
    systemctl('start', UNIT)
    must(show('ActiveState') == 'active' and mounted(), 'systemctl start returned before it was mounted')
    must(os.path.exists(f'{PLACE}/etc/os-release'), 'the rootfs is not the image')
    text = show('StatusText')
    must(text == f'{PLACE} is mounted', f'status: {text!r}')
    backend = inspect()['backend']
    systemctl('stop', UNIT)
    must(not mounted() and show('ActiveState') == 'inactive', 'stop left it')
    return f'backend {backend}, status "{text}"'


def kill_everything():
    """systemctl may say that it failed (EIO, seen on 7.3): systemd 252 takes the 0 that a dying process is in cgroup.procs for an error."""
    processes = [inspect()[who] for who in ('supervisor_pid', 'worker_pid')] + [show('MainPID')]
    run('systemctl', 'kill', '--kill-whom=all', '--signal=SIGKILL', UNIT, check=False)
    eventually(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in processes), 'all processes end')


def kill_all():
    """All its processes die: the next start goes on with the same mount, and open files are good."""
    reading, mount_id = start()
    kept = int(show('NFileDescriptorStore'))
    must(kept >= 8, f'systemd keeps {kept} descriptors')
    for _ in range(3):
        restarts = int(show('NRestarts'))
        kill_everything()
        went_on(mount_id, restarts)
        reading.goes_on()
    return f'3 times, {kept} descriptors kept, {reading.seen(3)}'


def watchdog(whom):
    reading, mount_id = start(watchdog=WATCHDOG)
    restarts = int(show('NRestarts'))
    told = inspect()
    pid = int(show('MainPID')) if whom == 'main' else told[f'{whom}_pid']
    os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    if whom == 'worker':
        # Either the supervisor puts another in its place, or systemd starts all anew.
        eventually(lambda: inspect()['worker_pid'] != pid and show('ActiveState') == 'active', 'another worker takes over')
    else:
        went_on(mount_id, restarts)
    must(inspect()['mount_id'] == mount_id, 'another mount')
    took = time.monotonic() - begun
    return f'after {took:.0f} s (WatchdogSec={WATCHDOG}), {int(show("NRestarts")) - restarts} starts, {reading.seen()}'


def watchdog_main(): return watchdog('main')
def watchdog_supervisor(): return watchdog('supervisor')
def watchdog_worker(): return watchdog('worker')


def worker_killed():
    """Ten times: the unit does not notice."""
    reading, mount_id = start()
    restarts = int(show('NRestarts'))
    for _ in range(10):
        worker = inspect()['worker_pid']
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: inspect()['worker_pid'] not in (worker, None, 0), 'a new worker')
        reading.goes_on()
    must(int(show('NRestarts')) == restarts and inspect()['mount_id'] == mount_id, 'the unit was started again')
    return f'10 times, {reading.seen(10)}'


def daemon_reexec():
    """systemd itself starts anew: what it keeps is kept."""
    reading, mount_id = start()
    kept = show('NFileDescriptorStore')
    systemctl('daemon-reexec')
    eventually(lambda: show('ActiveState') == 'active', 'systemd is back')
    must(show('NFileDescriptorStore') == kept, f'{kept} descriptors kept before, {show("NFileDescriptorStore")} after')
    restarts = int(show('NRestarts'))
    kill_everything()
    went_on(mount_id, restarts)
    return f'{kept} descriptors kept, then all processes killed: {reading.seen()}'


def restart():
    """By hand: unmounted and mounted anew."""
    drop_in()
    systemctl('start', UNIT)
    before = inspect()
    systemctl('restart', UNIT)
    after = inspect()
    # Not by the mount's number: the kernel gives one that came free to the next.
    must(after['supervisor_pid'] != before['supervisor_pid'] and len(mounted()) == 1, f'{before} {after} {mounted()}')
    must(open(f'{PLACE}/w/data').read() == 'of the volume\n', 'the volume is not there')
    must(not os.path.exists(f'/proc/{before["supervisor_pid"]}'), 'the old server runs')
    return 'a new mount, one in all'


def stop():
    """Nothing stays: mount, processes, record, descriptors; and what is open goes on until it is closed."""
    drop_in()
    systemctl('start', UNIT)
    its = inspect()
    held = os.open(f'{PLACE}/etc/data', os.O_RDONLY)
    systemctl('stop', UNIT)
    must(not mounted(), 'still mounted')
    must(show('NFileDescriptorStore') == '0', 'descriptors are kept')
    must(told('list') == [], 'a record is left')
    try: read = f'reads {len(os.pread(held, 100, 0))} bytes'
    except OSError as e: read = f'gets {errno.errorcode[e.errno]}'
    os.close(held)
    eventually(lambda: not any(os.path.exists(f'/proc/{its[k]}') for k in ('supervisor_pid', 'worker_pid')), 'its processes end')
    return f'an open file {read} after it'


def as_user(*words, check=True):
    user = pwd.getpwnam(USER)
    return run('setpriv', f'--reuid={user.pw_uid}', f'--regid={user.pw_gid}', '--init-groups', 'env', '-i', f'HOME={user.pw_dir}',
               'PATH=/usr/local/bin:/usr/bin:/bin', f'XDG_RUNTIME_DIR=/run/user/{user.pw_uid}', *words, check=check, cwd='/')


def user_import(): as_user('fsprov', 'image', 'import', f'{WORK}/image', '--name', 'img', '--replace', check=False)


def user_unit():
    """The template as a user's unit with linger, and nobody logged in."""
    user = pwd.getpwnam(USER)
    run('loginctl', 'enable-linger', USER)
    try:
        eventually(lambda: os.path.exists(f'/run/user/{user.pw_uid}/systemd/private'), "the user's systemd")
        user_import()
        text = open('/etc/systemd/system/fsprov@.service').read().replace('/run/fsprov/%i', '%t/fsprov/%i')
        text = text.replace('RequiresMountsFor=/var/lib/fsprov\n', '').replace('WantedBy=multi-user.target', 'WantedBy=default.target')
        units = f'{user.pw_dir}/.config/systemd/user'
        as_user('mkdir', '-p', units)
        write(f'{units}/fsprov@.service', text)
        as_user('systemctl', '--user', 'daemon-reload')
        as_user('systemctl', '--user', 'start', 'fsprov@img')
        place = f'/run/user/{user.pw_uid}/fsprov/img'
        must(mounted(place), 'not mounted')
        must('stories' in as_user('cat', f'{place}/etc/os-release'), 'not the image')
        before = json.loads(as_user('fsprov', 'inspect', '--json', 'img'))['mount_id']
        as_user('systemctl', '--user', 'kill', '--kill-whom=all', '--signal=SIGKILL', 'fsprov@img')
        eventually(lambda: as_user('systemctl', '--user', 'show', '-P', 'NRestarts', 'fsprov@img') == '1' and
                   'stories' in as_user('cat', f'{place}/etc/os-release'), 'it goes on')
        after = json.loads(as_user('fsprov', 'inspect', '--json', 'img'))['mount_id']
        must(before == after, 'another mount')
        as_user('systemctl', '--user', 'stop', 'fsprov@img')
        must(not mounted(place), 'stop left it')
    finally:
        run('loginctl', 'disable-linger', USER, check=False)
        eventually(lambda: run('systemctl', 'is-active', f'user@{user.pw_uid}.service', check=False) != 'active', 'the user is gone')
    return 'started, all processes killed, the same mount; stopped'


def login(line):
    """A login session of the user that does this and ends."""
    return run('su', '-l', USER, '-s', '/bin/bash', '-c', line, check=False)


def session():
    """KillUserProcesses=yes: a mount from a login session goes with it, as README says, one from a scope of the lingering user does not."""
    write('/etc/systemd/logind.conf.d/kill.conf', '[Login]\nKillUserProcesses=yes\n')
    systemctl('restart', 'systemd-logind')
    user = pwd.getpwnam(USER)
    home = f'{user.pw_dir}'
    run('loginctl', 'enable-linger', USER)
    try:
        eventually(lambda: os.path.exists(f'/run/user/{user.pw_uid}/systemd/private'), "the user's systemd")
        user_import()
        said = login('echo "session $XDG_SESSION_ID"; fsprov mount --backend fuse --id plain img ~/plain && ls ~/plain/etc/os-release; '
                     'systemd-run --user --scope --quiet fsprov mount --backend fuse --id scoped img ~/scoped && ls ~/scoped/etc/os-release')
        must('session ' in said and 'session \n' not in said, f'no login session: {said}')
        must(said.count('os-release') == 2, f'not mounted: {said}')
        health = lambda: {one['id']: one['state'] for one in json.loads(as_user('fsprov', 'list', '--json'))}
        # Told to end it unmounts, killed it leaves a dead mount.
        eventually(lambda: health().get('plain') in ('gone', 'dead'), 'logind ends the server of a plain mount')
        ended = health()['plain']
        must(health().get('scoped') == 'ready', f'{health()}')
        must('stories' in as_user('cat', f'{home}/scoped/etc/os-release'), 'the scoped one does not answer')
        as_user('fsprov', 'recover')
        now = health()
        as_user('fsprov', 'unmount', '--all')
        must(not mounted(f'{home}/plain') and not mounted(f'{home}/scoped'), 'unmount left something')
    finally:
        os.unlink('/etc/systemd/logind.conf.d/kill.conf')
        run('loginctl', 'disable-linger', USER, check=False)
        systemctl('restart', 'systemd-logind')
    return f'the plain one {ended} (after recover: {now.get("plain")}), the one in a scope ready'


def root_directory():
    """RootDirectory= with DynamicUser: a service of another user lives in the rootfs."""
    drop_in()
    systemctl('start', UNIT)
    said = run('systemd-run', '--quiet', '--wait', '--pipe', '-p', f'RootDirectory={PLACE}', '-p', 'DynamicUser=yes', '-p', 'MountAPIVFS=yes',
               '/bin/sh', '-c', 'id -u; cat /etc/os-release; touch /tmp/x && echo tmp; touch /etc/x || true')
    lines = said.splitlines()
    must(int(lines[0]) >= 61184 and 'ID=stories' in said and 'tmp' in lines, said)
    must('Read-only file system' in said, f'it could write to the image: {said}')
    return f'as uid {lines[0]}'


def nspawn(*options, line='cat /etc/os-release', expect='ID=stories'):
    drop_in()
    systemctl('start', UNIT)
    said = run('systemd-nspawn', '-q', '--register=no', '--keep-unit', '-D', PLACE, *options, '/bin/sh', '-c', line, check=False)
    must(expect in said, said)
    return said.splitlines()[-1]


def nspawn_plain(): return nspawn(line='cat /etc/os-release; cat /w/data; echo changed >/w/out && cat /w/out', expect='changed')
def nspawn_read_only(): return nspawn('--read-only')
def nspawn_volatile(): return nspawn('--volatile=overlay', line='touch /etc/new && ls /etc/new', expect='/etc/new')


def nspawn_mapped():
    """Each of the container's ids is one of the host, and the files are mapped back: the kernel allows it for a FUSE mount from 6.12 on."""
    drop_in('--backend fuse')
    systemctl('start', UNIT)
    said = run('systemd-nspawn', '-q', '--register=no', '--keep-unit', '-D', PLACE, '--private-users=pick', '--private-users-ownership=map',
               '/bin/stat', '-c', 'root owns it: %u', '/etc/os-release', check=False)
    if KERNEL >= (6, 12):
        must('root owns it: 0' in said, said)
        return 'mapped'
    must('map' in said.lower(), said)
    return f'refused, as this kernel must: {said.splitlines()[0]}'


STORIES = [ready, kill_all, worker_killed, watchdog_main, watchdog_supervisor, watchdog_worker, daemon_reexec, restart, stop, user_unit, session,
           root_directory, nspawn_plain, nspawn_read_only, nspawn_volatile, nspawn_mapped]


def main(names):
    if names[:1] == ['--reader']: return reader(*names[1:])
    prepare()
    shutil.copyfile('/vm/bin/fsprov@.service', '/etc/systemd/system/fsprov@.service')
    systemctl('daemon-reload')
    failed = 0
    for story in STORIES:
        if names and story.__name__ not in names: continue
        begun = time.monotonic()
        try: line = f'PASS {story()}'
        except Failed as why: line, failed = f'FAIL {why}', failed + 1
        except Exception: line, failed = f'FAIL {traceback.format_exc()}', failed + 1
        print(f'story: {story.__name__}: {line} [{time.monotonic() - begun:.0f} s]', flush=True)
        if 'FAIL' in line: print(run('journalctl', '-n', '25', '--no-pager', '-o', 'cat', check=False), flush=True)
        run('pkill', '-KILL', '-f', 'stories.py --reader', check=False)
        clear()
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
