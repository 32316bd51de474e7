#!/usr/bin/env python3
"""Measures writable root filesystems of an ordinary user, interleaved in one run: the kernel's overlay over directories and over a fsprov mount,
fsprov's writable FUSE tree, and fuse-overlayfs. Changes in fsprov's end with the rootfs, so fsync waits for no disk there.

  scripts/bench --writable [--rounds N] [--subjects A,B] [--out DIR]

Run as root, which makes a file system for it; all else runs as the user fsprov-test, in a user namespace with its subordinate ids. The image is a Debian
root filesystem with the sources of this project's crates in it. Each round mounts everything anew: "first" rows meet a new mount whose files the
page cache has. Below "overlay on used fsprov" the FUSE mount was read before, as the directories below the native overlay were. Writes writable.json
below DIR (default: target/bench) and prints the table.
"""
import argparse, glob, json, os, pwd, random, shutil, statistics, subprocess, sys, tempfile, time

USER = os.environ.get('FSPROV_TEST_USER', 'fsprov-test')
HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FSPROV = os.environ.get('FSPROV_BIN', os.path.join(HERE, 'target/release/fsprov'))
IMAGE = os.environ.get('FSPROV_BENCH_IMAGE', '/var/cache/fsprov-test/minbase.tar')
# Without dependencies that a minimal Debian lacks.
PACKAGES = ('hello figlet cowsay filters fortunes-min manpages time bc dc ed less nano sl tree pv lsof psmisc m4 patch '
            'diffstat dos2unix units netbase iso-codes xxd zip unzip file bzip2 xz-utils bsdextrautils tzdata ncal whiptail gawk jq').split()
DISK_BYTES = 24 << 30
PATIENCE = 30

ROWS = {
    'first walk + stat': 'find {r} -xdev -printf "%s\\n" >/dev/null',
    'walk again': 'find {r} -xdev >/dev/null',
    'walk + stat again': 'find {r} -xdev -printf "%s\\n" >/dev/null',
    'tar, first': 'tar -C {r} --one-file-system -cf - . | cat >/dev/null',
    'tar again': 'tar -C {r} --one-file-system -cf - . | cat >/dev/null',
    'dpkg, 25 packages': 'chroot {r} sh -c "PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive dpkg --force-depends -i /debs/*.deb" >/dev/null 2>&1',
    'unpack 170 MB': 'mkdir {r}/new && tar -C {r}/new --exclude=./dev/* -xf {image}',
    'chown -R': 'chown -R 33:33 {r}/usr/share',
    'rm -r': 'rm -r {r}/new {r}/usr/share/doc {r}/opt/sources/part0',
}
USED = 'overlay on used fsprov'
SUBJECTS = ['native overlay', 'overlay on fsprov', USED, 'fsprov writable', 'fuse-overlayfs']
# All names, attributes and content.
READ = 'find {0} -printf %s >/dev/null && tar -C {0} -cf - . | cat >/dev/null'


def say(text): print(f'bench: {text}', file=sys.stderr, flush=True)


def sh(command, **more):
    done = subprocess.run(['sh', '-c', command], capture_output=True, text=True, **more)
    if done.returncode:
        raise RuntimeError(f'{command}: exit {done.returncode}: {done.stderr.strip()[-800:]}')
    return done.stdout


class Inside:
    """In the user namespace."""
    def __init__(self, work):
        self.work = work
        os.environ.update(FSPROV_ROOT=f'{work}/state', HOME=work)

    def mount(self, subject):
        top = f'{self.work}/{self.id(subject)}'
        point, layer, changes = f'{top}/r', f'{self.work}/layer', f'upperdir={top}/up,workdir={top}/work'
        sh(f'mkdir -p {top}/up {top}/work {top}/lower {point}')
        if subject == 'native overlay':
            sh(f'mount -t overlay -o lowerdir={layer},{changes},userxattr overlay {point}')
        elif subject.startswith('overlay on '):
            # As mount --writable does for layers without their owners on the disk.
            sh(f'{self.work}/fsprov mount --backend fuse --id {self.id(subject)} bench {top}/lower')
            if subject == USED:
                sh(READ.format(f'{top}/lower'))
            sh(f'mount -t overlay -o lowerdir={top}/lower,{changes},userxattr,volatile overlay {point}')
        elif subject == 'fsprov writable':
            sh(f'{self.work}/fsprov mount --backend fuse --id {self.id(subject)} --writable bench {point}')
        else:
            sh(f'fuse-overlayfs -o lowerdir={layer},{changes} {point}')
        return point

    @staticmethod
    def id(subject): return subject.replace(' ', '-')

    def server_memory(self, subject):
        """Private memory of the servers in KiB."""
        if subject.startswith('native'):
            return 0
        begins = 'fuse-overlayfs' if subject == 'fuse-overlayfs' else f'fsprov: {self.work}/{self.id(subject)}/'
        total = 0
        for path in glob.glob('/proc/[0-9]*/cmdline'):
            try:
                if not open(path, 'rb').read().decode(errors='replace').startswith(begins):
                    continue
                for line in open(os.path.dirname(path) + '/smaps_rollup'):
                    if line.startswith(('Private_Dirty:', 'Private_Clean:')):
                        total += int(line.split()[1])
            except OSError:
                pass
        return total

    def unmount(self, subject):
        top = f'{self.work}/{self.id(subject)}'
        if subject != 'fsprov writable':
            sh(f'umount {top}/r')
        if 'fsprov' in subject:
            sh(f'{self.work}/fsprov unmount {self.id(subject)}')
        sh(f'rm -rf {top}')

    def run(self, options):
        work = self.work
        sh(f'mkdir {work}/layer && tar -C {work}/layer --exclude=./dev/* -xf {IMAGE} && mkdir -p {work}/layer/opt/sources && '
           f'cp -r {work}/sources/. {work}/layer/opt/sources/ && cp -r {work}/debs {work}/layer/debs')
        sh(f'tar -C {work}/layer -cf {work}/bench.tar . && {work}/fsprov image import --name bench {work}/bench.tar')
        files = int(sh(f'find {work}/layer | wc -l'))
        say(f'{files} files in the image')
        samples = {row: {s: [] for s in options.subjects} for row in ROWS}
        memory = {s: [] for s in options.subjects}
        for number in range(options.rounds):
            points = {s: self.mount(s) for s in options.subjects}
            for s, point in points.items():
                sh(f'mount --rbind /dev {point}/dev')
            for row, command in ROWS.items():
                # The page cache has all content, of the directories and of the store. Each time: some machines take away what nobody
                # touched for a minute (DAMON's pageout).
                for layers in 'layer', 'state', *([f'{self.id(USED)}/lower'] if USED in points else []):
                    sh(READ.format(f'{work}/{layers}'))
                for subject in random.sample(options.subjects, len(options.subjects)):
                    begin = time.perf_counter()
                    sh(command.format(r=points[subject], image=IMAGE))
                    samples[row][subject].append(time.perf_counter() - begin)
            for subject, point in points.items():
                memory[subject].append(self.server_memory(subject))
                sh(f'umount -l {point}/dev')
                self.unmount(subject)
            say(f'round {number + 1} of {options.rounds}')
        return {'files': files, 'seconds': samples, 'memory_kib': memory}


def table(result, subjects):
    median = lambda values: statistics.median(values) if values else 0
    lines = ['| work | native overlay, s | ' + ' | '.join(subjects[1:]) + ' |', '| --- |' + ' --- |' * len(subjects)]
    for row, by in result['seconds'].items():
        base = median(by[subjects[0]])
        lines.append(f'| {row} | {base:.2f} | ' + ' | '.join(f'{median(by[s]) / base:.2f}' for s in subjects[1:]) + ' |')
    lines.append('| server, private MiB | | ' + ' | '.join(f'{median(result["memory_kib"][s]) / 1024:.1f}' for s in subjects[1:]) + ' |')
    return '\n'.join(lines)


def prepare(top):
    work = f'{top}/w'
    os.mkdir(work)
    with open(f'{top}/disk', 'w') as disk:
        disk.truncate(DISK_BYTES)
    subprocess.run(['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0', disk.name], check=True)
    subprocess.run(['mount', '-o', 'loop', disk.name, work], check=True)
    for place in top, work:
        os.chmod(place, 0o755)
    os.makedirs(f'{work}/debs')
    for package in dict.fromkeys(PACKAGES):
        if len(os.listdir(f'{work}/debs')) < 25:
            subprocess.run(['apt-get', 'download', '-q', package], cwd=f'{work}/debs', capture_output=True)
    cargo = os.environ.get('CARGO_HOME', os.path.expanduser('~/.cargo'))
    for number, crate in enumerate(sorted(glob.glob(f'{cargo}/registry/src/*/*'))):
        shutil.copytree(crate, f'{work}/sources/part{number % 4}/{os.path.basename(crate)}', symlinks=True)
    shutil.copy(FSPROV, f'{work}/fsprov')
    shutil.copy(__file__, f'{work}/writable.py')
    say(f'{len(os.listdir(work + "/debs"))} packages')
    subprocess.run(['chown', '-R', f'{USER}:', work], check=True)
    return work


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--subjects', default=','.join(SUBJECTS))
    parser.add_argument('--out', default=os.path.join(HERE, 'target/bench'))
    parser.add_argument('--inside', help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.subjects = [s for s in SUBJECTS if s in options.subjects.split(',')]
    if options.inside:
        print(json.dumps(Inside(options.inside).run(options)))
        return
    if os.geteuid() != 0:
        sys.exit('bench: run as root')
    wanted = ['unshare', 'newuidmap', 'setpriv'] + [s for s in options.subjects if s == 'fuse-overlayfs']
    if missing := [tool for tool in wanted if not shutil.which(tool)]:
        sys.exit(f'bench: {", ".join(missing)} missing (apt-get install uidmap fuse-overlayfs)')
    top = tempfile.mkdtemp(prefix='fsprov-bw.')
    try:
        work, who = prepare(top), pwd.getpwnam(USER)
        words = ['setpriv', '--reuid', str(who.pw_uid), '--regid', str(who.pw_gid), '--init-groups', 'unshare', '--user', '--map-root-user', '--map-auto',
                 '--mount', '--pid', '--fork', '--mount-proc', '--kill-child', '/usr/bin/python3', f'{work}/writable.py', '--inside', work, '--rounds', str(options.rounds), '--subjects', ','.join(options.subjects)]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=work, env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'LC_ALL': 'C'})
        result = json.loads(done.stdout)
    finally:
        subprocess.run(['umount', f'{top}/w'], check=False)
        if f' {top}/' in open('/proc/self/mountinfo').read():
            say(f'something is still mounted below {top}: left there')
        else:
            shutil.rmtree(top, ignore_errors=True)
    os.makedirs(options.out, exist_ok=True)
    with open(os.path.join(options.out, 'writable.json'), 'w') as out:
        json.dump(result, out, indent=1)
    print(table(result, options.subjects))


if __name__ == '__main__':
    main(sys.argv[1:])
