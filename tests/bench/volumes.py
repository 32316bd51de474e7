#!/usr/bin/env python3
"""Measures writable volumes: fsprov's beside a kernel bind mount and the peers that Debian has, interleaved in one run.

  scripts/bench --volumes [--rounds N] [--rows A,B] [--subjects A,B] [--on ext4|here] [--out DIR] [--stats]

Run as root (the bind mount); servers and programs run as the ordinary user fsprov-test. Each sample works in a new directory.
--on: a new ext4 file system with mkfs's defaults, in a file below $TMPDIR (default), or $TMPDIR itself. Without a journal ext4
passes over inodes deleted in the last minutes one by one (recently_deleted in fs/ext4/ialloc.c): who comes after another's rm pays.
--stats: what the fsprov servers were asked, per row. Writes volumes.json below DIR (default: target/bench) and prints the table.
"""
import argparse, glob, json, os, pwd, random, shutil, signal, statistics, subprocess, sys, tempfile, time

USER = os.environ.get('FSPROV_TEST_USER', 'fsprov-test')
HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FSPROV = os.environ.get('FSPROV_BIN', os.path.join(HERE, 'target/release/fsprov'))
SOURCE_FILES = 3000            # of the tree that is unpacked and cloned
SOURCE_FILE_BYTES = 256 << 10  # larger files say more of the disk than of the file system
SQLITE_ROWS = 3000
PATIENCE = 30                  # seconds until a mount answers
DISK_BYTES = 16 << 30          # of the file system made for the run; its file is sparse

FIO = ('fio --name=job --filename={dir}/fio --size=64M --io_size=32M --bs=4k --ioengine=psync --randrepeat=1 --invalidate=1 '
       '--output-format=terse --rw=')
# Row: what is made ready in the new directory, and what is measured.
ROWS = {
    'unpack a source tree': ('', 'tar -C {dir} -xf {work}/source.tar'),
    'git clone + git status': ('', 'git clone -q --no-local {work}/source.git {dir}/clone && git -C {dir}/clone status --porcelain'),
    'sqlite inserts': ('', 'sqlite3 -batch {dir}/db ".read {work}/inserts.sql"'),
    'cargo build': ('cp -r {work}/crate {dir}/', 'cd {dir}/crate && {work}/toolchain/bin/cargo build -q --offline'),
    'fio randwrite 4k': ('dd if=/dev/zero of={dir}/fio bs=1M count=64 status=none', FIO + 'randwrite'),
    'fio randread 4k': ('dd if=/dev/zero of={dir}/fio bs=1M count=64 status=none', FIO + 'randread'),
}
# What each says of the host's own changes: seen within a second by `fsprov fuse` and bindfs. fuse-overlayfs gathers writes and keeps
# names and attributes for ever (its defaults: writeback=1, timeout=1e9); so does `fsprov --writeback ttl`.
SUBJECTS = {'bind': '', 'fsprov fuse': '', 'fsprov --writeback': '--writeback', 'fsprov --writeback ttl': '--writeback --volume-ttl 86400',
            'fuse-overlayfs': '', 'bindfs': ''}


def say(text): print(f'bench: {text}', file=sys.stderr, flush=True)


def as_user(command, **more):
    who = pwd.getpwnam(USER)
    words = ['setpriv', '--reuid', str(who.pw_uid), '--regid', str(who.pw_gid), '--init-groups']
    env = {'PATH': os.environ['PATH'], 'HOME': more.pop('home'), 'LC_ALL': 'C', **more.pop('env', {})}
    return words + command, {'env': env, **more}


class Bench:
    def __init__(self, top, on):
        self.servers, self.points = [], []
        self.top, self.on = top, on
        self.work = work = f'{top}/w'
        self.env = {'FSPROV_ROOT': f'{work}/state', 'RUSTC': f'{work}/toolchain/bin/rustc', 'CARGO_HOME': f'{work}/cargo',
                    'GIT_CONFIG_COUNT': '1', 'GIT_CONFIG_KEY_0': 'safe.directory', 'GIT_CONFIG_VALUE_0': '*'}

    def run(self, command, check=True):
        words, more = as_user(['sh', '-c', command], home=self.work, env=self.env)
        done = subprocess.run(words, capture_output=True, text=True, **more)
        if check and done.returncode:
            raise RuntimeError(f'{command}: exit {done.returncode}: {done.stderr.strip()[-800:]}')
        return done.stdout

    def prepare(self):
        work = self.work
        os.mkdir(work)
        if self.on == 'ext4':
            with open(f'{self.top}/disk', 'w') as disk:
                disk.truncate(DISK_BYTES)
            # Whole at once: else the kernel initializes inode tables during the run.
            subprocess.run(['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0', disk.name], check=True)
            subprocess.run(['mount', '-o', 'loop', disk.name, work], check=True)
            self.points.append(work)
        for place in self.top, work:
            os.chmod(place, 0o755)
        for name in ['image/data', 'toolchain', 'state', 'cargo', 'empty', 'fsprov-bin']:
            os.makedirs(f'{work}/{name}')
        shutil.copy(FSPROV, f'{work}/fsprov')
        sysroot = subprocess.run(['rustc', '--print', 'sysroot'], capture_output=True, text=True, check=True).stdout.strip()
        subprocess.run(['mount', '--bind', sysroot, f'{work}/toolchain'], check=True)
        self.points.append(f'{work}/toolchain')
        # The sources of crates that this project is made of: what a build unpacks.
        cargo = os.environ.get('CARGO_HOME', os.path.expanduser('~/.cargo'))
        count = 0
        for top in sorted(glob.glob(f'{cargo}/registry/src/*/*')):
            for at, _, names in os.walk(top):
                for name in sorted(names):
                    path = os.path.join(at, name)
                    if count < SOURCE_FILES and not os.path.islink(path) and os.path.getsize(path) < SOURCE_FILE_BYTES:
                        to = os.path.join(work, 'source', os.path.relpath(path, os.path.dirname(os.path.dirname(top))))
                        os.makedirs(os.path.dirname(to), exist_ok=True)
                        shutil.copy(path, to)
                        count += 1
        # Git would not take what crates tell it to ignore.
        subprocess.run(f'find {work}/source -name .gitignore -delete; find {work}/source -name .gitattributes -delete', shell=True, check=True)
        with open(f'{work}/inserts.sql', 'w') as out:
            out.write('pragma journal_mode=wal; pragma synchronous=normal; create table t(a integer primary key, b text);\n')
            out.writelines(f"insert into t(b) values('{'x' * 200} {n}');\n" for n in range(SQLITE_ROWS))
        os.makedirs(f'{work}/crate/src')
        mods = ''.join(f'pub mod m{n} {{ pub fn f(x: u64) -> u64 {{ x.wrapping_mul({n}).rotate_left({n % 60}) }} }}\n' for n in range(200))
        open(f'{work}/crate/src/lib.rs', 'w').write(mods)
        open(f'{work}/crate/src/main.rs', 'w').write('fn main() { println!("{}", crate_::m7::f(3)); }\n')
        open(f'{work}/crate/build.rs', 'w').write('fn main() {}\n')
        open(f'{work}/crate/Cargo.toml', 'w').write('[package]\nname = "crate_"\nversion = "0.1.0"\nedition = "2021"\n[workspace]\n')
        subprocess.run(['chown', '-R', f'{USER}:', work], check=False, stderr=subprocess.DEVNULL)
        self.run(f'cd {work}/source && tar -cf {work}/source.tar . && git init -q && git add -A && '
                 'git -c user.name=b -c user.email=b@example.com commit -qm all')
        self.run(f'git clone -q --bare {work}/source {work}/source.git')
        self.run(f'{work}/fsprov --version && {work}/toolchain/bin/rustc --version')
        say(f'{count} files in the source tree')

    def mount(self, subject):
        name = subject.replace(' ', '-').strip('-')
        vol, point = f'{self.work}/vol-{name}', f'{self.work}/at-{name}'
        self.run(f'mkdir {vol} {point}')
        if subject == 'bind':
            subprocess.run(['mount', '--bind', vol, point], check=True)
            self.points.append(point)
            return point
        if subject.startswith('fsprov'):
            self.run(f'{self.work}/fsprov mount --backend fuse --id {name} {SUBJECTS[subject]} -v {vol}:/data {self.work}/image {point}')
            return f'{point}/data'
        self.run(f'mkdir {self.work}/index-{name}')
        words = {'fuse-overlayfs': ['fuse-overlayfs', '-f', '-o', f'lowerdir={self.work}/empty,upperdir={vol},workdir={self.work}/index-{name}', point],
                 'bindfs': ['bindfs', '-f', '--no-allow-other', vol, point]}[subject]
        words, more = as_user(words, home=self.work, env=self.env)
        self.servers.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more))
        end = time.monotonic() + PATIENCE
        while f' {point} ' not in open('/proc/self/mountinfo').read():
            if time.monotonic() > end or self.servers[-1].poll() is not None:
                raise RuntimeError(f'{subject} does not mount')
            time.sleep(0.05)
        return point

    def requests(self, subject):
        if not subject.startswith('fsprov'):
            return {}
        name = subject.replace(' ', '-').strip('-')
        return json.loads(self.run(f'{self.work}/fsprov stats --json {name}'))['worker']['requests']

    def sample(self, subject, point, row, number):
        dir = f'{point}/{row.replace(" ", "-").replace("+", "and")}-{number}'
        setup, work = (text.format(dir=dir, work=self.work) for text in ROWS[row])
        self.run(f'mkdir {dir}; {setup or "true"}')
        before = self.requests(subject)
        begin = time.perf_counter()
        self.run(work)
        took = time.perf_counter() - begin
        asked = {k: v - before.get(k, 0) for k, v in self.requests(subject).items() if v > before.get(k, 0)}
        self.run(f'rm -rf {dir}', check=False)
        return took, asked

    def end(self):
        self.run(f'{self.work}/fsprov unmount --all', check=False)
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
        for point in reversed(self.points):
            subprocess.run(['umount', point], check=False)
        if f' {self.top}/' in open('/proc/self/mountinfo').read():
            say(f'something is still mounted below {self.top}: left there')
        else:
            shutil.rmtree(self.top, ignore_errors=True)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--rows', default=','.join(ROWS))
    parser.add_argument('--subjects', default=','.join(SUBJECTS))
    parser.add_argument('--on', choices=['ext4', 'here'], default='ext4')
    parser.add_argument('--out', default=os.path.join(HERE, 'target/bench'))
    parser.add_argument('--stats', action='store_true')
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        sys.exit('bench: run as root')
    rows = [r for r in ROWS if any(r.startswith(w) for w in options.rows.split(','))]
    subjects = [s for s in SUBJECTS if s in options.subjects.split(',')]
    wanted = ['fio', 'git', 'sqlite3'] + [s for s in subjects if s in ('fuse-overlayfs', 'bindfs')]
    if missing := [tool for tool in wanted if not shutil.which(tool)]:
        sys.exit(f'bench: {", ".join(missing)} missing (apt-get install {" ".join(missing)})')
    samples, asked = {row: {s: [] for s in subjects} for row in rows}, {}
    bench = Bench(tempfile.mkdtemp(prefix='fsprov-bv.'), options.on)
    try:
        bench.prepare()
        points = {s: bench.mount(s) for s in subjects}
        for number in range(options.rounds):
            for row in rows:
                for subject in random.sample(subjects, len(subjects)):
                    took, requests = bench.sample(subject, points[subject], row, number)
                    samples[row][subject].append(took)
                    asked[f'{row}: {subject}'] = requests
    finally:
        bench.end()
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, 'volumes.json'), 'w') as out:
        json.dump({'kernel': os.uname().release, 'cpus': os.cpu_count(), 'seconds': samples, 'requests': asked}, out, indent=1)
    print('| work on a volume | bind, s | ' + ' | '.join(s for s in subjects if s != 'bind') + ' |')
    print('| --- ' * (len(subjects) + 1) + '|')
    for row in rows:
        median = {s: statistics.median(samples[row][s]) for s in subjects}
        base = median.get('bind', 1.0)
        cells = [f'{median[s] / base:.2f}' for s in subjects if s != 'bind']
        print(f'| {row} | {base:.2f} | ' + ' | '.join(cells) + ' |')
    if options.stats:
        for key, requests in asked.items():
            if requests:
                print(key, dict(sorted(requests.items(), key=lambda kv: -kv[1])))


if __name__ == '__main__':
    main(sys.argv[1:])
